// Objects of which a process has one.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <new>

namespace dilated::ops {

/// The process's T. Never destroyed, as threads may call while the process ends. A forked process
/// begins with a new one: its parent's may be locked, or hold what only the parent can use.
template <typename T>
T& of_process() {
  alignas(T) static std::byte memory[sizeof(T)];
  static T* const made = [] {
    pthread_atfork(nullptr, nullptr, [] { new (memory) T; });
    return new (memory) T;
  }();
  return *made;
}

}  // namespace dilated::ops

// Which patterns on a device were compared with their calls already.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace dilated::ops {

/// Remembers the last kCapacity (pattern, fingerprint) pairs, so that a pattern that serves many
/// calls is compared on the device once. A pattern is its storage, the words of it, and the number
/// of times it was written to: the weak reference keeps the storage's address from being given to
/// another, but not its memory. Any thread may call.
class CheckedPatterns {
 public:
  /// Whether the pair is known; it is from now on, where writes to the tensor are counted.
  bool contains_or_insert(const at::Tensor& pattern, uint64_t fingerprint);

 private:
  struct Entry {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    const void* data;
    int64_t words;
    uint32_t version;
    uint64_t fingerprint;
  };
  static constexpr size_t kCapacity = 64;

  std::mutex mutex_;
  std::vector<Entry> entries_;
  size_t oldest_ = 0;  // once there are kCapacity
};

}  // namespace dilated::ops

// What planning may take: bytes and steps, never time, so that all processes decide alike.
#pragma once

#include <dilated/pattern.h>

#include <cstdint>
#include <functional>
#include <string>

#include "pattern/poller.h"

namespace dilated::pattern {

/// Counts bytes and steps, throws std::invalid_argument, which names dilation_rates, once there are
/// too many, and lets the caller of plan() interrupt.
class Budget {
 public:
  /// Both are kept by reference.
  Budget(const PatternSpec& spec, const std::function<void()>& poll);

  /// The pattern grows by so many bytes.
  void add_bytes(int64_t bytes) {
    bytes_ += bytes;
    if (bytes_ > limit_) {
      refuse_bytes();
    }
  }

  /// So many bytes are needed at once, beside the pattern's.
  void need_bytes(int64_t bytes) const {
    if (bytes > limit_) {
      refuse_bytes();
    }
  }

  /// The planner looks at so many positions, or whatever takes about as long.
  void add_steps(int64_t steps) {
    steps_ += steps;
    if (poller_.add_steps(steps)) {
      check_steps();
    }
  }

 private:
  [[noreturn]] void refuse_bytes() const;
  [[noreturn]] void refuse(const std::string& rule, const std::string& value) const;
  void check_steps() const;

  const PatternSpec& spec_;
  Poller poller_;
  const int64_t limit_;
  int64_t bytes_ = 0;
  int64_t steps_ = 0;
};

}  // namespace dilated::pattern

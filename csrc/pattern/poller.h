// Lets the caller of a long computation interrupt it.
#pragma once

#include <cstdint>
#include <functional>

namespace dilated::pattern {

/// Calls `poll`, if it is given, at the first step and then each time that more than `interval`
/// have been taken since.
class Poller {
 public:
  /// `poll` is kept by reference.
  Poller(const std::function<void()>& poll, int64_t interval) : poll_(poll), interval_(interval) {}

  /// Whether it was time to poll.
  bool add_steps(int64_t steps) {
    left_ -= steps;
    if (left_ >= 0) {
      return false;
    }
    left_ = interval_;
    if (poll_) {
      poll_();
    }
    return true;
  }

 private:
  const std::function<void()>& poll_;
  const int64_t interval_;
  int64_t left_ = 0;
};

}  // namespace dilated::pattern

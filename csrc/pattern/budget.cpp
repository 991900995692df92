#include "pattern/budget.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

namespace dilated {
namespace {

std::atomic<int64_t> max_bytes{int64_t{1} << 29};

}  // namespace

int64_t max_pattern_bytes() { return max_bytes; }

void set_max_pattern_bytes(int64_t bytes) {
  if (bytes < 1) {
    throw std::invalid_argument("max_pattern_bytes: must be at least 1, got " +
                                std::to_string(bytes));
  }
  max_bytes = bytes;
}

namespace pattern {
namespace {

constexpr int64_t kPollSteps = 1 << 20;
/// Allowed beyond one step for each byte of the limit.
constexpr int64_t kFreeSteps = 1 << 24;

}  // namespace

Budget::Budget(const PatternSpec& spec, const std::function<void()>& poll)
    : spec_(spec), poller_(poll, kPollSteps), limit_(max_pattern_bytes()) {}

void Budget::refuse_bytes() const {
  refuse("give a pattern of at most " + std::to_string(limit_) + " bytes (max_pattern_bytes)",
         "a larger one");
}

void Budget::refuse(const std::string& rule, const std::string& value) const {
  throw std::invalid_argument(
      "dilation_rates: must " + rule + ", got " + value + " for seq_len " +
      std::to_string(spec_.seq_len) + ", " + std::to_string(spec_.branches.size()) +
      " branches and " + std::to_string(spec_.heads) +
      " heads: take rates and segment lengths that divide one another, longer segments, or "
      "fewer branches or heads, or raise the limit by set_max_pattern_bytes");
}

void Budget::check_steps() const {
  if (steps_ - kFreeSteps > limit_) {
    refuse("be planned in at most " + std::to_string(limit_ + kFreeSteps) +
               " steps (max_pattern_bytes + 2^24)",
           "more");
  }
}

}  // namespace pattern
}  // namespace dilated

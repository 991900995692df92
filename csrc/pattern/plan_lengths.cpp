// Plans the lengths of a batch, on several threads where that pays: they share nothing.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "pattern/plan.h"

namespace dilated {
namespace {

constexpr int64_t kMostThreads = 8;
constexpr int64_t kWorthThreads = 256
                                  << 10;  // bytes to plan; a thread takes about as long as 5 KiB

class Crew {
 public:
  Crew(const PatternSpec& spec, const std::vector<int64_t>& lengths,
       const std::function<void()>& poll)
      : spec_(spec),
        lengths_(lengths),
        poll_(poll),
        limit_(max_pattern_bytes() + static_cast<int64_t>(lengths.size()) * kept_once()),
        planned_(lengths.size()) {}

  std::vector<std::vector<int32_t>> run() {
    if (!lengths_.empty()) {
      pattern::Scratch scratch;
      plan_next(poll_, scratch);
      std::vector<std::thread> helpers = start_helpers();
      work(poll_, scratch);
      for (std::thread& helper : helpers) {
        helper.join();
      }
    }
    if (failure_) {
      std::rethrow_exception(failure_);
    }
    return std::move(planned_);
  }

 private:
  /// What a batch has once, and each of its lengths as well.
  int64_t kept_once() const { return static_cast<int64_t>(sizeof(Header)) + 16 * spec_.heads + 64; }

  /// After the last of the lengths, which tells how much the others may be.
  int64_t count_helpers() const {
    const auto count = static_cast<int64_t>(lengths_.size());
    const int64_t longest = *std::max_element(lengths_.begin(), lengths_.end());
    const int64_t each = bytes_ * (longest / std::max<int64_t>(lengths_.back(), 1) + 1);
    const int64_t threads =
        std::min({kMostThreads, int64_t{std::thread::hardware_concurrency()}, count});
    const bool pays = count * each >= kWorthThreads && threads * each <= limit_;
    return pays ? std::max<int64_t>(threads - 1, 0) : 0;
  }

  std::vector<std::thread> start_helpers() {
    std::vector<std::thread> helpers;
    const int64_t count = count_helpers();
    helpers.reserve(static_cast<size_t>(count));
    try {
      while (static_cast<int64_t>(helpers.size()) < count) {
        helpers.emplace_back([this] {
          pattern::Scratch scratch;
          work([this] { stop_if_failed(); }, scratch);
        });
      }
    } catch (const std::system_error&) {
      return helpers;  // fewer do
    }
    return helpers;
  }

  void work(const std::function<void()>& poll, pattern::Scratch& scratch) noexcept {
    try {
      while (!has_failed_ && plan_next(poll, scratch)) {
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      failure_ = has_failed_ ? failure_ : std::current_exception();
      has_failed_ = true;
    }
  }

  bool plan_next(const std::function<void()>& poll, pattern::Scratch& scratch) {
    const size_t turn = next_++;
    if (turn >= lengths_.size()) {
      return false;
    }
    const size_t i = turn == 0 ? lengths_.size() - 1 : turn - 1;
    planned_[i] = pattern::plan_one(one_sequence(spec_, lengths_[i]), poll, scratch);
    bytes_ += static_cast<int64_t>(planned_[i].size() * sizeof(int32_t));
    if (bytes_ > limit_) {  // as the batch's would be
      throw std::invalid_argument(
          "sequences: must give a pattern of at most " + std::to_string(max_pattern_bytes()) +
          " bytes (max_pattern_bytes), got a larger one for " + std::to_string(lengths_.size()) +
          " lengths: take fewer at once, or raise the limit by set_max_pattern_bytes");
    }
    return true;
  }

  void stop_if_failed() const {
    if (has_failed_) {
      throw std::runtime_error("another thread has failed");
    }
  }

  const PatternSpec& spec_;
  const std::vector<int64_t>& lengths_;
  const std::function<void()>& poll_;
  const int64_t limit_;
  std::vector<std::vector<int32_t>> planned_;
  std::atomic<size_t> next_{0};
  std::atomic<int64_t> bytes_{0};
  std::atomic<bool> has_failed_{false};
  std::mutex mutex_;
  std::exception_ptr failure_;
};

}  // namespace

std::vector<std::vector<int32_t>> plan_lengths(const PatternSpec& spec,
                                               const std::vector<int64_t>& lengths,
                                               const std::function<void()>& poll) {
  return Crew(spec, lengths, poll).run();
}

}  // namespace dilated

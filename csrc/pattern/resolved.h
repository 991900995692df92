// A specification with nothing left to fill in, which is what the planner reads.
#pragma once

#include <dilated/pattern.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace dilated::pattern {

/// A segment's length within a sequence; an empty sequence counts as one position.
inline int64_t clip(int64_t segment_length, int64_t seq_len) {
  return std::min(segment_length, std::max<int64_t>(seq_len, 1));
}

inline Range resolve(const Range& range, int64_t seq_len) {
  return {range.begin, range.end == -1 ? seq_len : range.end};
}

/// Without empty stretches, and those that follow each other as one: places are the same.
inline std::vector<Range> resolve(const std::vector<Range>& stretches, int64_t seq_len) {
  std::vector<Range> result;
  for (const Range& stretch : stretches) {
    const auto [begin, end] = resolve(stretch, seq_len);
    if (!result.empty() && result.back().end == begin) {
      result.back().end = end;
    } else if (begin < end) {
      result.push_back({begin, end});
    }
  }
  return result;
}

/// A range of positions whose rows lie one after another in a tensor.
struct Stretch {
  int64_t begin, end;
  int32_t shift;         // place - position of its rows
  bool is_far;           // in the second of the keys' tensors
  int32_t sequence = 0;  // which of the batch
};

/// Of resolved ranges, by position. Places count through `near`, then through `far`.
inline std::vector<Stretch> stretches_of(const std::vector<Range>& near,
                                         const std::vector<Range>& far = {}) {
  std::vector<Stretch> stretches;
  int64_t place = 0;
  for (const std::vector<Range>* ranges : {&near, &far}) {
    for (const auto& [begin, end] : *ranges) {
      stretches.push_back({begin, end, static_cast<int32_t>(place - begin), ranges == &far});
      place += end - begin;
    }
  }
  std::sort(stretches.begin(), stretches.end(),
            [](const Stretch& a, const Stretch& b) { return a.begin < b.begin; });
  return stretches;
}

inline int64_t head_offset(const Branch& branch, int64_t head) {
  const auto& offsets = branch.head_offsets;
  return offsets.empty() ? head % branch.dilation_rate : offsets[static_cast<size_t>(head)];
}

/// The branch's segment that holds a position of the sequence. Both count through the batch's rows.
inline Range segment_at(const Branch& branch, const Sequence& sequence, int64_t position) {
  const int64_t length = clip(branch.segment_length, sequence.length);
  const int64_t begin = sequence.first + (position - sequence.first) / length * length;
  return {begin, std::min(begin + length, sequence.first + sequence.length)};
}

/// The same pattern with ranges that have an end, every branch's offsets, and its sequences:
/// without a batch, one.
struct ResolvedSpec : PatternSpec {
  /// Throws as validate() does.
  explicit ResolvedSpec(const PatternSpec& spec) : PatternSpec(spec) {
    validate(spec);
    queries = resolve(spec.queries, seq_len);
    keys = resolve(spec.keys, seq_len);
    far_keys = resolve(spec.far_keys, seq_len);
    if (!sequences.has_value()) {
      sequences.emplace({Sequence{0, seq_len}});
    }
    for (Branch& branch : branches) {
      if (branch.head_offsets.empty()) {
        branch.head_offsets = interleaved_offsets(branch.dilation_rate, heads);
      }
    }
  }

  /// As the function above, of ranges above, cut where a sequence begins or ends, without what lies
  /// in none; shifts are then of positions within the sequence.
  std::vector<Stretch> stretches(const std::vector<Range>& near,
                                 const std::vector<Range>& far = {}) const {
    std::vector<Stretch> result;
    auto sequence = sequences->begin();
    for (const Stretch& whole : stretches_of(near, far)) {
      while (sequence != sequences->end() && sequence->first + sequence->length <= whole.begin) {
        ++sequence;
      }
      for (auto at = sequence; at != sequences->end() && at->first < whole.end; ++at) {
        const int64_t begin = std::max(whole.begin, at->first);
        const int64_t end = std::min(whole.end, at->first + at->length);
        if (begin < end) {
          result.push_back({begin, end, whole.shift + static_cast<int32_t>(at->first), whole.is_far,
                            static_cast<int32_t>(at - sequences->begin())});
        }
      }
    }
    return result;
  }
};

}  // namespace dilated::pattern

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
  int32_t shift;  // place - position of its rows
  bool is_far;    // in the second of the keys' tensors
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

/// The same pattern with segments clipped to the sequence, ranges that have an end, and every
/// branch's offsets.
struct ResolvedSpec : PatternSpec {
  /// Throws as validate() does.
  explicit ResolvedSpec(const PatternSpec& spec) : PatternSpec(spec) {
    validate(spec);
    queries = resolve(spec.queries, seq_len);
    keys = resolve(spec.keys, seq_len);
    far_keys = resolve(spec.far_keys, seq_len);
    for (Branch& branch : branches) {
      branch.segment_length = clip(branch.segment_length, seq_len);
      if (branch.head_offsets.empty()) {
        branch.head_offsets = interleaved_offsets(branch.dilation_rate, heads);
      }
    }
  }

  /// The branch's segment that holds a position of the sequence.
  Range segment(const Branch& branch, int64_t position) const {
    const int64_t begin = position / branch.segment_length * branch.segment_length;
    return {begin, std::min(begin + branch.segment_length, seq_len)};
  }
};

}  // namespace dilated::pattern

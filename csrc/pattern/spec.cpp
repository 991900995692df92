// The specification of a pattern: its checks, its hash, and the two usual tables of head offsets.
#include <dilated/pattern.h>

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "pattern/resolved.h"

namespace dilated {
namespace {

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
  }
}

void validate_stretches(const std::vector<Range>& stretches, int64_t seq_len, const char* name) {
  int64_t previous_end = 0;
  for (const Range& stretch : stretches) {
    const auto [begin, end] = pattern::resolve(stretch, seq_len);
    require(0 <= begin && begin <= end && end <= seq_len, name,
            ": must have 0 <= begin <= end <= seq_len, ", seq_len, ", got begin ", begin, ", end ",
            stretch.end);
    require(previous_end <= begin, name,
            ": must be in the sequence's order and not overlap, got a stretch that begins at ",
            begin, " after one that ends at ", previous_end);
    previous_end = end;
  }
}

/// Near and far keys, each checked, share no position; the backward knows neither.
void validate_far_keys(const PatternSpec& spec) {
  if (spec.far_keys.empty() && spec.rows == QueryRows::kAll) {
    return;
  }
  require(QueryRows::kAll <= spec.rows && spec.rows <= QueryRows::kFar,
          "rows: must be kAll, kNear or kFar, got ", static_cast<int32_t>(spec.rows));
  require(spec.directions == Directions::kForward,
          "directions: must be kForward where there are far_keys or rows is not kAll, got ",
          static_cast<int32_t>(spec.directions));
  int64_t previous_end = 0;
  for (const auto& [begin, end, shift, is_far, sequence] :
       pattern::stretches_of(pattern::resolve(spec.keys, spec.seq_len),
                             pattern::resolve(spec.far_keys, spec.seq_len))) {
    require(previous_end <= begin, "far_keys: must not overlap keys, got position ", begin,
            " in both");
    previous_end = end;
  }
}

void validate_sequences(const PatternSpec& spec) {
  if (!spec.sequences.has_value()) {
    return;
  }
  int64_t previous_end = 0;
  for (size_t i = 0; i < spec.sequences->size(); ++i) {
    const auto [first, length] = (*spec.sequences)[i];
    require(length >= 0, "sequences: must have lengths of at least 0, got ", length, " at index ",
            i);
    require(first >= previous_end,
            "sequences: must ascend and not overlap, each from 0 or the end of the one before, ",
            previous_end, ", on, got one that begins at ", first, " at index ", i);
    require(first <= spec.seq_len && length <= spec.seq_len - first,
            "sequences: must end within the ", spec.seq_len, " rows, got first row ", first,
            ", length ", length, " at index ", i);
    previous_end = first + length;
  }
}

void validate_branches(const PatternSpec& spec) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  require(!spec.branches.empty(),
          "segment_lengths: must hold at least one branch, got an empty list");
  require(spec.branches.size() <= std::numeric_limits<uint16_t>::max(),
          "segment_lengths: must hold at most 65535 branches, got ", spec.branches.size());
  for (size_t i = 0; i < spec.branches.size(); ++i) {
    const auto& [length, rate, offsets] = spec.branches[i];
    require(length > 0, "segment_lengths: must be positive and below 2^63, got ", length,
            " at index ", i);
    require(0 < rate && rate <= kMax, "dilation_rates: must be positive and below 2^31, got ", rate,
            " at index ", i);
  }
}

void validate_offsets(const PatternSpec& spec) {
  const auto heads = static_cast<size_t>(spec.heads);
  for (size_t i = 0; i < spec.branches.size(); ++i) {
    const auto& [length, rate, offsets] = spec.branches[i];
    require(offsets.empty() || offsets.size() == heads,
            "head_offsets: must have one column for each of the ", heads, " heads, got ",
            offsets.size(), " in branch ", i);
    for (size_t head = 0; head < offsets.size(); ++head) {
      require(-1 <= offsets[head] && offsets[head] < rate,
              "head_offsets: must be -1 (head not in the branch) or at least 0 and below the "
              "branch's dilation rate, ",
              rate, ", got ", offsets[head], " for head ", head, " in branch ", i);
    }
  }
}

template <typename OffsetOf>
std::vector<int64_t> offsets_of(int64_t heads, OffsetOf offset_of) {
  std::vector<int64_t> offsets(static_cast<size_t>(std::max<int64_t>(heads, 0)));
  int64_t head = 0;
  for (int64_t& offset : offsets) {
    offset = offset_of(head++);
  }
  return offsets;
}

class Hash {
 public:
  void add(int64_t value) {
    uint64_t x = state_ ^ (static_cast<uint64_t>(value) + 0x9e3779b97f4a7c15ull);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    state_ = (x ^ (x >> 31)) + 0x2545f4914f6cdd1dull;
  }
  uint64_t value() const { return state_; }

 private:
  uint64_t state_ = 0;
};

}  // namespace

std::vector<int64_t> interleaved_offsets(int64_t dilation_rate, int64_t heads) {
  require(dilation_rate > 0, "dilation_rate: must be positive, got ", dilation_rate);
  return offsets_of(heads, [&](int64_t head) { return head % dilation_rate; });
}

std::vector<int64_t> blocked_offsets(int64_t dilation_rate, int64_t heads) {
  require(dilation_rate > 0, "dilation_rate: must be positive, got ", dilation_rate);
  const int64_t block = (heads + dilation_rate - 1) / dilation_rate;
  return offsets_of(heads, [&](int64_t head) { return head / block; });
}

void validate(const PatternSpec& spec) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  require(0 <= spec.seq_len && spec.seq_len < kMax,
          "seq_len: must be at least 0 and below 2^31 - 1, got ", spec.seq_len);
  require(0 < spec.heads && spec.heads <= std::numeric_limits<uint16_t>::max(),
          "heads: must be at least 1 and below 2^16, got ", spec.heads);
  require(0 < spec.kv_heads && spec.heads % spec.kv_heads == 0,
          "kv_heads: must be positive and divide heads, ", spec.heads, ", got ", spec.kv_heads);
  const int64_t row_tile = spec.row_tile.value_or(kRowTile);
  require(0 < row_tile && row_tile <= 4096, "row_tile: must be at least 1 and at most 4096, got ",
          row_tile);
  require(Directions::kForward <= spec.directions && spec.directions <= Directions::kBoth,
          "directions: must be kForward, kTransposed or kBoth, got ",
          static_cast<int32_t>(spec.directions));
  validate_branches(spec);
  validate_offsets(spec);
  validate_stretches(spec.queries, spec.seq_len, "queries");
  validate_stretches(spec.keys, spec.seq_len, "keys");
  validate_stretches(spec.far_keys, spec.seq_len, "far_keys");
  validate_far_keys(spec);
  validate_sequences(spec);
}

bool is_whole(const PatternSpec& spec) {
  const auto has_all = [&](const std::vector<Range>& ranges) {
    const std::vector<Range> resolved = pattern::resolve(ranges, spec.seq_len);
    return spec.seq_len == 0 || resolved == std::vector<Range>{{0, spec.seq_len}};
  };
  return has_all(spec.queries) && has_all(spec.keys) && spec.far_keys.empty() &&
         spec.rows == QueryRows::kAll;
}

uint64_t fingerprint(const PatternSpec& spec) {
  Hash hash;
  for (const int64_t field :
       {spec.seq_len, spec.heads, spec.kv_heads, static_cast<int64_t>(spec.is_causal),
        static_cast<int64_t>(spec.padding), static_cast<int64_t>(spec.rows)}) {
    hash.add(field);
  }
  for (const std::vector<Range>& rows : {spec.queries, spec.keys, spec.far_keys}) {
    const std::vector<Range> stretches = pattern::resolve(rows, spec.seq_len);
    hash.add(static_cast<int64_t>(stretches.size()));
    for (const Range& stretch : stretches) {
      hash.add(stretch.begin);
      hash.add(stretch.end);
    }
  }
  for (const Branch& branch : spec.branches) {
    hash.add(pattern::clip(branch.segment_length, spec.seq_len));
    hash.add(branch.dilation_rate);
  }
  for (const Branch& branch : spec.branches) {
    for (int64_t head = 0; head < spec.heads; ++head) {
      hash.add(pattern::head_offset(branch, head));
    }
  }
  if (spec.sequences.has_value()) {
    hash.add(static_cast<int64_t>(spec.sequences->size()));
    for (const auto& [first, length] : *spec.sequences) {
      hash.add(first);
      hash.add(length);
    }
  }
  return hash.value();
}

}  // namespace dilated

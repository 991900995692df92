// The specification of a pattern: its checks, its hash, and the two usual tables of head offsets.
#include <dilated/pattern.h>

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

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

void validate_range(const Range& range, int64_t seq_len, const char* name) {
  const int64_t end = range.end == -1 ? seq_len : range.end;
  require(0 <= range.begin && range.begin <= end && end <= seq_len, name,
          ": 0 <= begin <= end <= seq_len must hold, got begin ", range.begin, ", end ", range.end,
          ", seq_len ", seq_len);
}

void validate_branches(const PatternSpec& spec) {
  const auto& lengths = spec.segment_lengths;
  const auto& rates = spec.dilation_rates;
  require(!lengths.empty(), "segment_lengths: at least one branch is needed, got an empty list");
  require(lengths.size() == rates.size(),
          "segment_lengths and dilation_rates must have the same length, got ", lengths.size(),
          " and ", rates.size());
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  for (size_t i = 0; i < lengths.size(); ++i) {
    require(lengths[i] > 0, "segment_lengths: every length must be positive, got ", lengths[i],
            " at index ", i);
    require(0 < rates[i] && rates[i] <= kMax,
            "dilation_rates: every rate must be positive and below 2^31, got ", rates[i],
            " at index ", i);
  }
  require(lengths.size() <= std::numeric_limits<uint16_t>::max(),
          "segment_lengths: at most 65535 branches, got ", lengths.size());
}

void validate_offsets(const PatternSpec& spec) {
  const size_t heads = static_cast<size_t>(spec.heads);
  const size_t branches = spec.segment_lengths.size();
  require(spec.head_offsets.size() == branches * heads,
          "head_offsets: one offset per branch and head is needed, [", branches, ", ", heads,
          "] = ", branches * heads, " numbers, got ", spec.head_offsets.size());
  for (size_t i = 0; i < spec.head_offsets.size(); ++i) {
    const int64_t rate = spec.dilation_rates[i / heads];
    const int64_t offset = spec.head_offsets[i];
    require(
        -1 <= offset && offset < rate,
        "head_offsets: -1 (head not in the branch) or 0 <= offset < dilation rate must hold, got ",
        offset, " for head ", i % heads, " in branch ", i / heads, " of rate ", rate);
  }
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

std::vector<int64_t> interleaved_offsets(const std::vector<int64_t>& dilation_rates,
                                         int64_t heads) {
  std::vector<int64_t> offsets;
  offsets.reserve(dilation_rates.size() * static_cast<size_t>(std::max<int64_t>(heads, 0)));
  for (const int64_t rate : dilation_rates) {
    require(rate > 0, "dilation_rates: every rate must be positive, got ", rate);
    for (int64_t head = 0; head < heads; ++head) {
      offsets.push_back(head % rate);
    }
  }
  return offsets;
}

std::vector<int64_t> blocked_offsets(const std::vector<int64_t>& dilation_rates, int64_t heads) {
  std::vector<int64_t> offsets;
  offsets.reserve(dilation_rates.size() * static_cast<size_t>(std::max<int64_t>(heads, 0)));
  for (const int64_t rate : dilation_rates) {
    require(rate > 0, "dilation_rates: every rate must be positive, got ", rate);
    const int64_t block = (heads + rate - 1) / rate;
    for (int64_t head = 0; head < heads; ++head) {
      offsets.push_back(head / block);
    }
  }
  return offsets;
}

void validate(const PatternSpec& spec) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  require(0 <= spec.seq_len && spec.seq_len < kMax,
          "seq_len: 0 <= seq_len < 2^31 - 1 must hold, got ", spec.seq_len);
  require(0 < spec.heads && spec.heads <= std::numeric_limits<uint16_t>::max(),
          "heads: 1 <= heads <= 65535 must hold, got ", spec.heads);
  require(0 < spec.kv_heads && spec.heads % spec.kv_heads == 0,
          "kv_heads: must be positive and divide heads, got ", spec.kv_heads, " for ", spec.heads,
          " heads");
  require(0 < spec.row_tile && spec.row_tile <= 4096,
          "row_tile: 1 <= row_tile <= 4096 must hold, got ", spec.row_tile);
  validate_branches(spec);
  validate_offsets(spec);
  validate_range(spec.queries, spec.seq_len, "queries");
  validate_range(spec.keys, spec.seq_len, "keys");
}

uint64_t fingerprint(const PatternSpec& spec) {
  Hash hash;
  const auto end = [&](const Range& range) { return range.end == -1 ? spec.seq_len : range.end; };
  for (const int64_t field :
       {spec.seq_len, spec.heads, spec.kv_heads, static_cast<int64_t>(spec.is_causal),
        static_cast<int64_t>(spec.padding), spec.queries.begin, end(spec.queries), spec.keys.begin,
        end(spec.keys), spec.row_tile}) {
    hash.add(field);
  }
  for (size_t i = 0; i < spec.segment_lengths.size(); ++i) {
    hash.add(std::min(spec.segment_lengths[i], spec.seq_len));
    hash.add(spec.dilation_rates[i]);
  }
  for (const int64_t offset : spec.head_offsets) {
    hash.add(offset);
  }
  return hash.value();
}

}  // namespace dilated

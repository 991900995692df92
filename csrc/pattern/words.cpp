#include "pattern/words.h"

#include <cstring>

#include "pattern/resolved.h"

namespace dilated::pattern {
namespace {

int32_t count_rows(const std::vector<Range>& ranges, int64_t seq_len) {
  int64_t rows = 0;
  for (const auto& [begin, end] : resolve(ranges, seq_len)) {
    rows += end - begin;
  }
  return static_cast<int32_t>(rows);
}

void split(uint64_t number, uint32_t (&halves)[2]) {
  halves[0] = static_cast<uint32_t>(number);
  halves[1] = static_cast<uint32_t>(number >> 32);
}

}  // namespace

bool is_symmetric(const PatternSpec& spec) {
  return spec.heads == spec.kv_heads &&
         resolve(spec.queries, spec.seq_len) == resolve(spec.keys, spec.seq_len) &&
         spec.far_keys.empty() && spec.rows == QueryRows::kAll;
}

bool asks_for(const PatternSpec& spec, Directions direction) {
  return (static_cast<int32_t>(spec.directions) & static_cast<int32_t>(direction)) != 0;
}

void seal(const PatternSpec& spec, const Table& forward, const Table& transposed,
          std::vector<int32_t>& words) {
  Header header{};
  header.magic = kPatternMagic;
  header.words = static_cast<int32_t>(words.size());
  split(fingerprint(spec), header.fingerprint);
  header.seq_len = static_cast<int32_t>(spec.seq_len);
  header.heads = static_cast<int32_t>(spec.heads);
  header.kv_heads = static_cast<int32_t>(spec.kv_heads);
  header.is_causal = spec.is_causal ? 1 : 0;
  header.branches = static_cast<int32_t>(spec.branches.size());
  header.queries = count_rows(spec.queries, spec.seq_len);
  header.near_keys = count_rows(spec.keys, spec.seq_len);
  header.keys = header.near_keys + count_rows(spec.far_keys, spec.seq_len);
  header.forward = forward;
  header.transposed = transposed;
  std::memcpy(words.data(), &header, sizeof(header));
  split(checksum(words.data(), header.words), header.checksum);
  std::memcpy(words.data(), &header, sizeof(header));
}

}  // namespace dilated::pattern

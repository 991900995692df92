// The planner: from branches and offsets to tile lists.
//
// The sequence is cut into *cells* at every branch's segment boundaries, so that all rows of a cell
// lie in the same segments. Within a cell a row's columns depend only on which branches it is in;
// rows in the same branches form a *group*. Where the boundaries around two cells look the same
// from inside, their groups are the same but for the origin and are stored once: with nested
// segments the table of groups does not grow with the sequence.
//
//   segments of branch 0    |-----|-----|-----|-----|-----|-----|-----|-----|
//   segments of branch 1    |-----------|-----------|-----------|-----------|
//   segments of branch 2    |-----------------------|-----------------------|
//   kinds of cells          |  a  |  b  |  c  |  d  |  a  |  b  |  c  |  d  |
//   spans                   |-----------------------|-----------------------|
#include <dilated/pattern.h>

#include <cstring>

#include "pattern/budget.h"
#include "pattern/resolved.h"
#include "pattern/table.h"

namespace dilated {
namespace {

using pattern::Budget;
using pattern::ResolvedSpec;
using pattern::TablePlanner;

int32_t count_rows(const std::vector<Range>& stretches) {
  int64_t rows = 0;
  for (const auto& [begin, end] : stretches) {
    rows += end - begin;
  }
  return static_cast<int32_t>(rows);
}

Header header_of(const ResolvedSpec& spec) {
  const uint64_t hash = fingerprint(spec);
  Header header{};
  header.magic = kPatternMagic;
  header.fingerprint[0] = static_cast<uint32_t>(hash);
  header.fingerprint[1] = static_cast<uint32_t>(hash >> 32);
  header.seq_len = static_cast<int32_t>(spec.seq_len);
  header.heads = static_cast<int32_t>(spec.heads);
  header.kv_heads = static_cast<int32_t>(spec.kv_heads);
  header.row_tile = static_cast<int32_t>(spec.row_tile);
  header.is_causal = spec.is_causal ? 1 : 0;
  header.branches = static_cast<int32_t>(spec.branches.size());
  header.queries = count_rows(spec.queries);
  header.keys = count_rows(spec.keys);
  return header;
}

bool asks_for(const PatternSpec& spec, Directions direction) {
  return (static_cast<int32_t>(spec.directions) & static_cast<int32_t>(direction)) != 0;
}

/// Whether one table serves both directions. "In the same segment, on the same lattice" is
/// symmetric, so only grouped heads, or queries and keys at different positions, need two.
bool is_symmetric(const ResolvedSpec& spec) {
  return spec.heads == spec.kv_heads && spec.queries == spec.keys;
}

}  // namespace

std::vector<int32_t> plan(const PatternSpec& spec, const std::function<void()>& poll) {
  const ResolvedSpec resolved(spec);
  Budget budget(spec, poll);
  pattern::Lists lists;
  std::vector<int32_t> words(sizeof(Header) / sizeof(int32_t));
  Header header = header_of(resolved);
  const bool one_for_both = is_symmetric(resolved);
  const bool transposed = asks_for(spec, Directions::kTransposed) && !one_for_both;
  if (asks_for(spec, Directions::kForward) || one_for_both) {
    header.forward = TablePlanner(resolved, /*transposed=*/false, budget, lists)
                         .write(words, transposed ? 1 : 0);
  }
  if (transposed) {
    header.transposed = TablePlanner(resolved, /*transposed=*/true, budget, lists).write(words, 0);
  } else if (one_for_both) {
    header.transposed = header.forward;
  }
  header.words = static_cast<int32_t>(words.size());
  std::memcpy(words.data(), &header, sizeof(header));
  const uint64_t sum = checksum(words.data(), header.words);
  header.checksum[0] = static_cast<uint32_t>(sum);
  header.checksum[1] = static_cast<uint32_t>(sum >> 32);
  std::memcpy(words.data(), &header, sizeof(header));
  return words;
}

}  // namespace dilated

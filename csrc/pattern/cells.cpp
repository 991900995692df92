#include "pattern/cells.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

namespace dilated::pattern {
namespace {

struct CellKindHash {
  size_t operator()(const CellKind& kind) const {
    uint64_t hash = static_cast<uint64_t>(kind.length) * 2 + (kind.in_columns ? 1 : 0);
    for (const BranchAt& at : kind.branches) {
      for (const int64_t field : {at.phase, at.lo, at.hi}) {
        hash = (hash ^ static_cast<uint64_t>(field)) * 0x9e3779b97f4a7c15ull;
        hash ^= hash >> 29;
      }
    }
    return static_cast<size_t>(hash);
  }
};

CellKind look_around(const std::vector<int64_t>& segment_lengths, int64_t seq_len,
                     const Range& columns, int64_t begin, int64_t end) {
  CellKind kind;
  kind.length = end - begin;
  kind.in_columns = columns.begin <= begin && begin < columns.end;
  kind.branches.reserve(segment_lengths.size());
  for (const int64_t length : segment_lengths) {
    const int64_t segment = begin / length * length;
    const int64_t segment_end = std::min(segment + length, seq_len);
    kind.branches.push_back({begin - segment, std::max(segment, columns.begin) - begin,
                             std::min(segment_end, columns.end) - begin, segment_end - segment});
  }
  return kind;
}

}  // namespace

Cells cut_cells(const std::vector<int64_t>& segment_lengths, int64_t seq_len, const Range& rows,
                const Range& columns, Budget& budget) {
  Cells result;
  const auto kind_bytes =
      static_cast<int64_t>(2 * (sizeof(CellKind) + segment_lengths.size() * sizeof(BranchAt)));
  const int64_t shortest = *std::min_element(segment_lengths.begin(), segment_lengths.end());
  budget.need_bytes((rows.end - rows.begin) / shortest * static_cast<int64_t>(sizeof(Cell)));
  std::unordered_map<CellKind, int32_t, CellKindHash> ids;
  for (int64_t begin = rows.begin; begin < rows.end;) {
    int64_t end = rows.end;
    bool starts_span = true;
    for (const int64_t length : segment_lengths) {
      end = std::min(end, (begin / length + 1) * length);
      starts_span = starts_span && begin % length == 0;
    }
    for (const int64_t cut : {columns.begin, columns.end}) {
      end = cut > begin ? std::min(end, cut) : end;
    }
    if (starts_span || result.cells.empty()) {
      result.spans.push_back(result.cells.size());
    }
    CellKind kind = look_around(segment_lengths, seq_len, columns, begin, end);
    const auto [found, is_new] = ids.try_emplace(kind, static_cast<int32_t>(result.kinds.size()));
    if (is_new) {
      result.kinds.push_back(std::move(kind));
    }
    result.cells.push_back({begin, found->second});
    budget.add_steps(static_cast<int64_t>(segment_lengths.size()));
    budget.need_bytes(static_cast<int64_t>(result.kinds.size()) * kind_bytes +
                      static_cast<int64_t>(result.cells.size() * sizeof(Cell)));
    begin = end;
  }
  result.spans.push_back(result.cells.size());
  return result;
}

}  // namespace dilated::pattern

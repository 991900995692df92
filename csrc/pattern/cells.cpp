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

/// Where a cell ends that begins at a position of the rows, and whether it begins a span.
struct Cut {
  int64_t end;
  bool starts_span;
};

Cut next_cut(const ResolvedSpec& spec, const Range& rows, const Range& columns, int64_t begin) {
  Cut cut{rows.end, true};
  for (const Branch& branch : spec.branches) {
    const Range segment = spec.segment(branch, begin);
    cut.end = std::min(cut.end, segment.end);
    cut.starts_span = cut.starts_span && segment.begin == begin;
  }
  for (const int64_t edge : {columns.begin, columns.end}) {
    cut.end = edge > begin ? std::min(cut.end, edge) : cut.end;
  }
  return cut;
}

CellKind look_around(const ResolvedSpec& spec, const Range& columns, const Range& cell) {
  CellKind kind;
  kind.length = cell.end - cell.begin;
  kind.in_columns = columns.begin <= cell.begin && cell.begin < columns.end;
  kind.branches.reserve(spec.branches.size());
  for (const Branch& branch : spec.branches) {
    const auto [begin, end] = spec.segment(branch, cell.begin);
    kind.branches.push_back({cell.begin - begin, std::max(begin, columns.begin) - cell.begin,
                             std::min(end, columns.end) - cell.begin, end - begin});
  }
  return kind;
}

}  // namespace

Cells cut_cells(const ResolvedSpec& spec, const Range& rows, const Range& columns, Budget& budget) {
  Cells result;
  const size_t branches = spec.branches.size();
  const auto kind_bytes =
      static_cast<int64_t>(2 * (sizeof(CellKind) + branches * sizeof(BranchAt)));
  const auto shortest = std::min_element(
      spec.branches.begin(), spec.branches.end(),
      [](const Branch& a, const Branch& b) { return a.segment_length < b.segment_length; });
  budget.need_bytes((rows.end - rows.begin) / shortest->segment_length *
                    static_cast<int64_t>(sizeof(Cell)));
  std::unordered_map<CellKind, int32_t, CellKindHash> ids;
  for (int64_t begin = rows.begin; begin < rows.end;) {
    const auto [end, starts_span] = next_cut(spec, rows, columns, begin);
    if (starts_span || result.cells.empty()) {
      result.spans.push_back(result.cells.size());
    }
    CellKind kind = look_around(spec, columns, {begin, end});
    const auto [found, is_new] = ids.try_emplace(kind, static_cast<int32_t>(result.kinds.size()));
    if (is_new) {
      result.kinds.push_back(std::move(kind));
    }
    result.cells.push_back({begin, found->second});
    budget.add_steps(static_cast<int64_t>(branches));
    budget.need_bytes(static_cast<int64_t>(result.kinds.size()) * kind_bytes +
                      static_cast<int64_t>(result.cells.size() * sizeof(Cell)));
    begin = end;
  }
  result.spans.push_back(result.cells.size());
  return result;
}

}  // namespace dilated::pattern

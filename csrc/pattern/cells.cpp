#include "pattern/cells.h"

#include <dilated/pattern_layout.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

namespace dilated::pattern {
namespace {

struct CellKindHash {
  size_t operator()(const CellKind& kind) const {
    uint64_t hash = static_cast<uint64_t>(kind.length) * 2 + (kind.in_columns ? 1 : 0);
    const auto add = [&](int64_t field) {
      hash = (hash ^ static_cast<uint64_t>(field)) * 0x9e3779b97f4a7c15ull;
      hash ^= hash >> 29;
    };
    for (const auto& [phase, length, width] : kind.branches) {
      add(phase);
      add(length);
      add(width);
    }
    for (const auto& [begin, end, is_far] : kind.columns) {
      add(begin);
      add(is_far ? -end : end);
    }
    return static_cast<size_t>(hash);
  }
};

/// Goes through the rows once, from front to back.
class Cutter {
 public:
  Cutter(const ResolvedSpec& spec, const std::vector<Stretch>& columns, Budget& budget)
      : spec_(spec), columns_(columns), budget_(budget) {}

  void cut(const Stretch& rows) {
    sequence_ = &(*spec_.sequences)[static_cast<size_t>(rows.sequence)];
    for (int64_t begin = rows.begin; begin < rows.end;) {
      while (stretch_ < columns_.size() && columns_[stretch_].end <= begin) {
        ++stretch_;
      }
      const Range cell{begin, end_of_cell(begin, rows.end)};
      if (starts_span(begin)) {
        cells_.spans.push_back(cells_.cells.size());
      }
      add_cell(cell, rows);
      begin = cell.end;
    }
  }

  Cells finish() {
    cells_.spans.push_back(cells_.cells.size());
    return std::move(cells_);
  }

 private:
  int64_t end_of_cell(int64_t begin, int64_t end) const {
    for (const Branch& branch : spec_.branches) {
      end = std::min(end, segment_at(branch, *sequence_, begin).end);
    }
    if (stretch_ < columns_.size()) {
      const Stretch& columns = columns_[stretch_];
      end = std::min(end, columns.begin > begin ? columns.begin : columns.end);
    }
    return end;
  }

  /// Whether no segment at `begin` meets a segment of an earlier cell.
  bool starts_span(int64_t begin) const {
    return std::all_of(spec_.branches.begin(), spec_.branches.end(), [&](const Branch& branch) {
      return segment_at(branch, *sequence_, begin).begin >= reach_;
    });
  }

  void add_cell(const Range& cell, const Stretch& rows) {
    CellKind kind;
    const size_t first_stretch = look_around(cell, kind);
    budget_.add_steps(static_cast<int64_t>(kind.branches.size() + kind.columns.size()));
    const auto [found, is_new] = ids_.try_emplace(kind, static_cast<int32_t>(cells_.kinds.size()));
    if (is_new) {
      kind_bytes_ +=
          static_cast<int64_t>(2 * (sizeof(kind) + kind.branches.size() * sizeof(BranchAt) +
                                    kind.columns.size() * sizeof(ColumnsAt)));
      cells_.kinds.push_back(std::move(kind));
    }
    cells_.cells.push_back({cell.begin - sequence_->first, found->second, rows.shift,
                            static_cast<int32_t>(first_stretch), rows.sequence});
    budget_.need_bytes(kind_bytes_ + static_cast<int64_t>(cells_.cells.size() * sizeof(Cell)));
  }

  /// Returns the first stretch of columns that a segment reaches.
  size_t look_around(const Range& cell, CellKind& kind) {
    kind.length = cell.end - cell.begin;
    kind.in_columns = stretch_ < columns_.size() && columns_[stretch_].begin <= cell.begin;
    kind.branches.reserve(spec_.branches.size());
    Range reach = cell;
    for (const Branch& branch : spec_.branches) {
      const Range segment = segment_at(branch, *sequence_, cell.begin);
      kind.branches.push_back({cell.begin - segment.begin, segment.end - segment.begin,
                               clip(branch.segment_length, sequence_->length)});
      reach = {std::min(reach.begin, segment.begin), std::max(reach.end, segment.end)};
    }
    reach_ = std::max(reach_, reach.end);
    size_t first = stretch_;
    while (first > 0 && columns_[first - 1].end > reach.begin) {
      --first;
    }
    for (size_t i = first; i < columns_.size() && columns_[i].begin < reach.end; ++i) {
      kind.columns.push_back({std::max(columns_[i].begin, reach.begin) - cell.begin,
                              std::min(columns_[i].end, reach.end) - cell.begin,
                              columns_[i].is_far});
    }
    if (kind.columns.size() > kMaxStretches) {
      throw std::invalid_argument(
          "queries and keys: must have at most " + std::to_string(kMaxStretches) +
          " stretches in a row's segments, got " + std::to_string(kind.columns.size()));
    }
    return first;
  }

  static constexpr size_t kMaxStretches = 1 + std::numeric_limits<decltype(Run::stretch)>::max();

  const ResolvedSpec& spec_;
  const std::vector<Stretch>& columns_;
  Budget& budget_;
  const Sequence* sequence_ = nullptr;  // of the rows at hand
  Cells cells_;
  std::unordered_map<CellKind, int32_t, CellKindHash> ids_;
  int64_t kind_bytes_ = 0;
  size_t stretch_ = 0;  // of columns: the first that ends after the cell at hand begins
  int64_t reach_ = 0;   // where the last segment of the cells so far ends
};

}  // namespace

Cells cut_cells(const ResolvedSpec& spec, const std::vector<Stretch>& rows,
                const std::vector<Stretch>& columns, Budget& budget) {
  const auto shortest = std::min_element(
      spec.branches.begin(), spec.branches.end(),
      [](const Branch& a, const Branch& b) { return a.segment_length < b.segment_length; });
  int64_t cells = 0;
  for (const Stretch& stretch : rows) {
    cells += (stretch.end - stretch.begin) / shortest->segment_length;
  }
  budget.need_bytes(cells * static_cast<int64_t>(sizeof(Cell)));
  Cutter cutter(spec, columns, budget);
  for (const Stretch& stretch : rows) {
    cutter.cut(stretch);
  }
  return cutter.finish();
}

}  // namespace dilated::pattern

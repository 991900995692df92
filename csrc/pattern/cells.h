// Cells: the stretches between neighbouring segment boundaries, all of whose rows lie in the same
// segments.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pattern/budget.h"
#include "pattern/resolved.h"

namespace dilated::pattern {

/// A branch as a cell sees it; positions are relative to the cell's first one.
struct BranchAt {
  int64_t phase;   // how far into its segment the cell begins
  int64_t lo, hi;  // the columns of its segment, lo <= x < hi
  int64_t cut;     // length of its segment within the sequence
  bool operator==(const BranchAt&) const = default;
};

/// Cells that look the same from inside.
struct CellKind {
  int64_t length = 0;
  bool in_columns = false;  // the cell's own positions are among the columns' range
  std::vector<BranchAt> branches;
  bool operator==(const CellKind&) const = default;
};

struct Cell {
  int64_t begin;
  int32_t kind;
};

struct Cells {
  std::vector<Cell> cells;
  std::vector<CellKind> kinds;
  std::vector<size_t> spans;  // the first cell of each span, then the number of cells
};

/// Cuts the rows where a segment of any branch or the columns' range begins or ends.
Cells cut_cells(const ResolvedSpec& spec, const Range& rows, const Range& columns, Budget& budget);

}  // namespace dilated::pattern

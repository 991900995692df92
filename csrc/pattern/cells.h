// Cells: the stretches between neighbouring segment boundaries, all of whose rows lie in the same
// segments.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pattern/budget.h"
#include "pattern/resolved.h"

namespace dilated::pattern {

/// A branch's segment as a cell in it sees it.
struct BranchAt {
  int64_t phase;   // how far into the segment the cell begins
  int64_t length;  // of the segment within the sequence
  int64_t width;   // of the branch's segments in this sequence that it does not cut short
  bool operator==(const BranchAt&) const = default;
};

/// Columns that a cell's segments reach, relative to the cell's first position.
struct ColumnsAt {
  int64_t begin, end;
  bool is_far;  // as Stretch::is_far
  bool operator==(const ColumnsAt&) const = default;
};

/// Cells that look the same from inside.
struct CellKind {
  int64_t length = 0;
  bool in_columns = false;  // the cell's own positions are among the columns'
  std::vector<BranchAt> branches;
  std::vector<ColumnsAt> columns;  // those of each stretch
  bool operator==(const CellKind&) const = default;
};

struct Cell {
  int64_t begin;  // within its sequence
  int32_t kind;
  int32_t row_shift;      // place - position of its rows
  int32_t first_stretch;  // of columns: that of CellKind::columns[0]
  int32_t sequence;
};

struct Cells {
  std::vector<Cell> cells;
  std::vector<CellKind> kinds;
  std::vector<size_t> spans;  // the first cell of each span, then the number of cells
};

/// Cuts the rows where a segment of any branch or a stretch of the columns begins or ends. Rows and
/// columns are the specification's stretches().
Cells cut_cells(const ResolvedSpec& spec, const std::vector<Stretch>& rows,
                const std::vector<Stretch>& columns, Budget& budget);

}  // namespace dilated::pattern

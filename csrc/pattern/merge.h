// Rows of several cells that have the same columns, as one group.
//
// A cell ends where a segment of any branch ends, also for rows that are not in that branch. Where
// short segments make short cells, such rows fill tiles together:
//
//   cells of 4        |....|....|....|....|    x: not in the branch of 4, only in that of 16
//   rows              |x.x.|x.x.|x.x.|x.x.|
//   groups of x       |  a |  b |  c |  d |    the same columns: those of the branch of 16
//   merged            |         a         |
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "pattern/budget.h"
#include "pattern/cells.h"
#include "pattern/groups.h"

namespace dilated::pattern {

/// The groups of a kind of cells and a class: groups[first .. first + count).
struct GroupSpan {
  int32_t first, count;
};

/// Spans as cells, each with the groups of all its cells.
struct MergedCells {
  Cells cells;  // kinds are numbers, without contents
  Lists lists;
  std::vector<GroupSpan> groups;  // [kinds, classes], as the argument
};

/// groups: [kinds, classes] of the cells. Nothing where spans share too little for it, or their
/// cells lie in different stretches.
std::optional<MergedCells> merge_cells(const Cells& cells, const std::vector<GroupSpan>& groups,
                                       size_t classes, const Lists& lists, Budget& budget);

}  // namespace dilated::pattern

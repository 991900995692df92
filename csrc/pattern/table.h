// One direction's lists: tiles, groups and runs.
#pragma once

#include <dilated/pattern_layout.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pattern/budget.h"
#include "pattern/cells.h"
#include "pattern/groups.h"
#include "pattern/heads.h"
#include "pattern/resolved.h"

namespace dilated::pattern {

/// Rows are queries and columns keys or, transposed, the other way round.
class TablePlanner {
 public:
  /// Specification, budget and lists, which are emptied and filled, are kept by reference.
  TablePlanner(const ResolvedSpec& spec, bool transposed, Budget& budget, Lists& lists);

  /// Appends the table and reserves memory for so many more.
  Table write(std::vector<int32_t>& words, size_t tables_to_come) const;

 private:
  struct GroupRange {
    int32_t first, count;  // count -1: not planned yet
  };

  void reserve(size_t calls);
  void plan_span(size_t first_cell, size_t last_cell);
  bool is_wanted(const Group& group, const CellKind& kind) const;
  int64_t tiles_of(int32_t group) const {
    const auto index = static_cast<size_t>(group);
    return is_wanted_[index] ? (int64_t{lists_.groups[index].rows} + row_tile_ - 1) / row_tile_ : 0;
  }
  int64_t spans() const { return static_cast<int64_t>(cells_.spans.size()) - 1; }
  const GroupRange& groups_of(size_t cell, size_t head_class) const;
  Tile* write_span(size_t first_cell, size_t last_cell, bool is_last, Tile* tile) const;
  Tile* write_classes(size_t first_cell, size_t last_cell, size_t first_class, size_t last_class,
                      Tile* tile) const;
  Tile* write_tiles(int32_t group, const Cell& cell, Tile* tile) const;
  std::vector<int32_t> class_heads() const;

  Budget& budget_;
  const QueryRows wanted_;
  const bool is_causal_;
  const int32_t row_tile_;
  const std::vector<HeadClass> classes_;
  const std::vector<Stretch> columns_;
  const Cells cells_;
  Lists& lists_;
  GroupPlanner planner_;
  std::vector<GroupRange> group_ranges_;  // [kinds, classes]
  std::vector<bool> is_wanted_;           // [groups]: those of others have no tiles
  std::vector<int32_t> span_tiles_;       // Table::span_tiles_at's
  int64_t tiles_ = 0;
};

}  // namespace dilated::pattern

// One direction's lists: tiles, groups and runs.
#pragma once

#include <dilated/pattern_layout.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "pattern/budget.h"
#include "pattern/cells.h"
#include "pattern/groups.h"
#include "pattern/heads.h"
#include "pattern/merge.h"
#include "pattern/resolved.h"
#include "pattern/row_tile.h"

namespace dilated::pattern {

/// Rows are queries and columns keys or, transposed, the other way round.
class TablePlanner {
 public:
  /// Specification, budget and scratch, whose lists are emptied and filled, are kept by reference.
  TablePlanner(const ResolvedSpec& spec, bool transposed, Budget& budget, Scratch& scratch);

  /// Appends the table and reserves memory for so many more.
  Table write(std::vector<int32_t>& words, size_t tables_to_come) const;

 private:
  struct GroupRange {
    GroupSpan groups{0, -1};  // count -1: not planned yet
    Computed computed{};      // by all heads of the class
    int64_t tiles[2] = {};    // of either cut
  };
  /// Tiles of one height.
  struct Cut {
    int64_t row_tile;
    int64_t tiles = 0;
    std::vector<int32_t> span_tiles{};  // Table::span_tiles_at's

    /// Of so many rows. A 32-bit division is faster.
    int64_t count(int32_t rows) const {
      return static_cast<uint32_t>(rows + row_tile - 1) / static_cast<uint32_t>(row_tile);
    }
  };

  void reserve(size_t calls);
  void plan_spans();
  void plan_span(size_t first_cell, size_t last_cell);
  void plan_groups(size_t number, size_t head_class, GroupRange& range);
  bool is_wanted(const Group& group, const CellKind& kind) const;
  void count_groups(size_t head_class, GroupRange& range) const;
  void merge_spans();
  void end_span();
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
  const std::vector<HeadClass>& classes_;
  const std::vector<Stretch> columns_;
  Cells cells_;
  Lists& lists_;
  GroupPlanner planner_;
  std::vector<GroupRange> group_ranges_;  // [kinds, classes]
  std::array<Cut, 2> cuts_;
  Computed computed_;
  const Cut* cut_;  // the chosen one
};

}  // namespace dilated::pattern

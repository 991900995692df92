#include "pattern/table.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "pattern/words.h"

namespace dilated::pattern {
namespace {

int64_t bytes_of(const Lists& lists) {
  return static_cast<int64_t>(lists.groups.size() * sizeof(Group) +
                              lists.runs.size() * sizeof(Run));
}

std::vector<Stretch> keys_of(const ResolvedSpec& spec) {
  return spec.stretches(spec.keys, spec.far_keys);
}

}  // namespace

TablePlanner::TablePlanner(const ResolvedSpec& spec, bool transposed, Budget& budget,
                           Scratch& scratch)
    : budget_(budget),
      wanted_(spec.rows),
      is_causal_(spec.is_causal),
      classes_(scratch.classes[transposed ? 1 : 0].of(spec,
                                                      transposed ? spec.heads / spec.kv_heads : 1)),
      columns_(transposed ? spec.stretches(spec.queries) : keys_of(spec)),
      cells_(cut_cells(spec, transposed ? keys_of(spec) : spec.stretches(spec.queries), columns_,
                       budget)),
      lists_(scratch.lists),
      planner_(spec, !transposed && !spec.is_causal && spec.padding == Padding::kZeros, budget,
               scratch),
      cuts_{Cut{spec.row_tile.value_or(kRowTile)}, Cut{spec.row_tile.value_or(kShortRowTile)}},
      cut_(cuts_.data()) {
  lists_.groups.clear();
  lists_.runs.clear();
  budget_.add_bytes(static_cast<int64_t>(columns_.size() * sizeof(int32_t)));  // their shifts
  // Every cell has at least one tile for each class.
  budget_.need_bytes(static_cast<int64_t>(cells_.cells.size() * classes_.size() * sizeof(Tile)));
  group_ranges_.resize(cells_.kinds.size() * classes_.size());
  reserve(group_ranges_.size());
  plan_spans();
  if (choose_row_tile(computed_) == kShortRowTile && wanted_ == QueryRows::kAll) {
    merge_spans();
  }
  const bool is_short = !spec.row_tile.has_value() && choose_row_tile(computed_) == kShortRowTile;
  cut_ = &cuts_[is_short ? 1 : 0];
  budget_.add_bytes((cut_->tiles - cuts_[0].tiles) * static_cast<int64_t>(sizeof(Tile)));
}

void TablePlanner::plan_spans() {
  for (size_t s = 0; s + 1 < cells_.spans.size(); ++s) {
    end_span();
    budget_.add_bytes(sizeof(int32_t));
    plan_span(cells_.spans[s], cells_.spans[s + 1]);
  }
  end_span();
}

/// Merges the groups of a span's cells if that spares much.
void TablePlanner::merge_spans() {
  constexpr double kMuch = 0.75;
  std::vector<GroupSpan> groups;
  groups.reserve(group_ranges_.size());
  for (const GroupRange& range : group_ranges_) {
    groups.push_back(range.groups);
  }
  std::optional<MergedCells> merged = merge_cells(cells_, groups, classes_.size(), lists_, budget_);
  if (!merged.has_value()) {
    return;
  }
  std::swap(lists_, merged->lists);
  std::vector<GroupRange> ranges(merged->groups.size());
  Computed computed;
  for (size_t i = 0; i < ranges.size(); ++i) {
    ranges[i].groups = merged->groups[i];
    count_groups(i % classes_.size(), ranges[i]);
  }
  for (const Cell& cell : merged->cells.cells) {
    for (size_t c = 0; c < classes_.size(); ++c) {
      computed.add(ranges[static_cast<size_t>(cell.kind) * classes_.size() + c].computed);
    }
  }
  if (computed.low > kMuch * computed_.low) {
    std::swap(lists_, merged->lists);
    return;
  }
  budget_.add_bytes(bytes_of(lists_) - bytes_of(merged->lists) -
                    cuts_[0].tiles * static_cast<int64_t>(sizeof(Tile)) -
                    spans() * static_cast<int64_t>(sizeof(int32_t)));
  cells_ = std::move(merged->cells);
  group_ranges_ = std::move(ranges);
  computed_ = {};
  for (Cut& cut : cuts_) {
    cut = Cut{cut.row_tile};
  }
  plan_spans();
}

void TablePlanner::end_span() {
  for (Cut& cut : cuts_) {
    cut.span_tiles.push_back(static_cast<int32_t>(cut.tiles));
  }
}

// Reserved memory that is not used costs nothing; growing copies.
void TablePlanner::reserve(size_t calls) {
  constexpr size_t kMostCalls = 1 << 12;
  lists_.groups.reserve(std::min(calls, kMostCalls) * 8);
  lists_.runs.reserve(std::min(calls, kMostCalls) * 96);
}

const TablePlanner::GroupRange& TablePlanner::groups_of(size_t cell, size_t head_class) const {
  const auto kind = static_cast<size_t>(cells_.cells[cell].kind);
  return group_ranges_[kind * classes_.size() + head_class];
}

/// Whether the group's rows are among those that the pattern is for.
bool TablePlanner::is_wanted(const Group& group, const CellKind& kind) const {
  const Run* runs = lists_.runs.data();
  int32_t last = 0;  // row
  for (int32_t j = group.row_runs; j < group.row_runs + group.row_run_count; ++j) {
    last = std::max(last, runs[j].start + runs[j].stride * (runs[j].count - 1));
  }
  const Run* columns = runs + group.column_runs;
  const bool is_far = std::any_of(columns, columns + group.column_run_count, [&](const Run& run) {
    return kind.columns[run.stretch].is_far && !(is_causal_ && run.start > last);
  });
  return is_far == (wanted_ == QueryRows::kFar);
}

/// Plans the groups of the span's cells, unless their kind was planned before; counts the tiles.
void TablePlanner::plan_span(size_t first_cell, size_t last_cell) {
  for (size_t c = 0; c < classes_.size(); ++c) {
    budget_.add_steps(static_cast<int64_t>(last_cell - first_cell));
    for (size_t cell = first_cell; cell < last_cell; ++cell) {
      const auto kind = static_cast<size_t>(cells_.cells[cell].kind);
      GroupRange& range = group_ranges_[kind * classes_.size() + c];
      if (range.groups.count < 0) {
        plan_groups(kind, c, range);
      }
      budget_.add_steps(range.groups.count);
      budget_.add_bytes(range.tiles[0] * static_cast<int64_t>(sizeof(Tile)));
      cuts_[0].tiles += range.tiles[0];
      cuts_[1].tiles += range.tiles[1];
      computed_.add(range.computed);
    }
  }
}

void TablePlanner::plan_groups(size_t number, size_t head_class, GroupRange& range) {
  const CellKind& kind = cells_.kinds[number];
  const auto first = static_cast<int32_t>(lists_.groups.size());
  planner_.plan(kind, static_cast<int32_t>(number), classes_[head_class],
                static_cast<int32_t>(head_class));
  if (wanted_ != QueryRows::kAll) {
    const auto planned = lists_.groups.begin() + first;
    lists_.groups.erase(std::remove_if(planned, lists_.groups.end(),
                                       [&](const Group& group) { return !is_wanted(group, kind); }),
                        lists_.groups.end());
  }
  range.groups = {first, static_cast<int32_t>(lists_.groups.size()) - first};
  count_groups(head_class, range);
}

void TablePlanner::count_groups(size_t head_class, GroupRange& range) const {
  const auto heads = static_cast<int64_t>(classes_[head_class].heads.size());
  const auto first = lists_.groups.begin() + range.groups.first;
  std::for_each(first, first + range.groups.count, [&](const Group& group) {
    range.tiles[0] += cuts_[0].count(group.rows);
    range.tiles[1] += cuts_[1].count(group.rows);
    range.computed.add(computed_pairs(group.rows, group.columns), heads);
  });
}

/// Class by class, as what runs together then reads the keys of few heads, which stay in L2. The
/// last classes are taken together, so that short lists fill the gaps that long ones leave in the
/// end.
Tile* TablePlanner::write_span(size_t first_cell, size_t last_cell, bool is_last,
                               Tile* tile) const {
  constexpr int64_t kLastTiles = 1024;  // a GPU runs a few hundred at once
  const auto classes = static_cast<int64_t>(classes_.size());
  const int64_t each = std::max<int64_t>(1, cut_->tiles / (spans() * classes));
  const int64_t together = is_last ? std::min(classes, kLastTiles / each + 1) : 1;
  const auto apart = static_cast<size_t>(classes - together);
  for (size_t c = 0; c < apart; ++c) {
    tile = write_classes(first_cell, last_cell, c, c + 1, tile);
  }
  return write_classes(first_cell, last_cell, apart, classes_.size(), tile);
}

/// First the longest lists of every cell and class, then the second longest of each, and so on.
Tile* TablePlanner::write_classes(size_t first_cell, size_t last_cell, size_t first_class,
                                  size_t last_class, Tile* tile) const {
  bool found = true;
  for (int32_t rank = 0; found; ++rank) {
    found = false;
    for (size_t c = first_class; c < last_class; ++c) {
      for (size_t cell = first_cell; cell < last_cell; ++cell) {
        const auto [first, count] = groups_of(cell, c).groups;
        if (rank < count) {
          found = true;
          tile = write_tiles(first + rank, cells_.cells[cell], tile);
        }
      }
    }
  }
  return tile;
}

Tile* TablePlanner::write_tiles(int32_t group, const Cell& cell, Tile* tile) const {
  const int32_t rows = lists_.groups[static_cast<size_t>(group)].rows;
  const auto row_tile = static_cast<int32_t>(cut_->row_tile);
  for (int64_t row = 0; row < rows; row += row_tile) {
    const auto first = static_cast<int32_t>(row);
    *tile++ = {.group = group,
               .origin = static_cast<int32_t>(cell.begin),
               .first_row = first,
               .rows = std::min(rows - first, row_tile),
               .row_shift = cell.row_shift,
               .first_stretch = cell.first_stretch,
               .first_window = -1,
               .sequence = cell.sequence};
  }
  return tile;
}

/// Table::class_heads_at's.
std::vector<int32_t> TablePlanner::class_heads() const {
  std::vector<int32_t> result{0};
  for (const HeadClass& head_class : classes_) {
    result.push_back(result.back() + static_cast<int32_t>(head_class.heads.size()));
  }
  for (const HeadClass& head_class : classes_) {
    result.insert(result.end(), head_class.heads.begin(), head_class.heads.end());
  }
  return result;
}

Table TablePlanner::write(std::vector<int32_t>& words, size_t tables_to_come) const {
  Table table{};
  for (const HeadClass& head_class : classes_) {
    table.max_class_heads =
        std::max(table.max_class_heads, static_cast<int32_t>(head_class.heads.size()));
  }
  table.classes = static_cast<int32_t>(classes_.size());
  table.spans = static_cast<int32_t>(spans());
  table.tiles = static_cast<int32_t>(cut_->tiles);
  table.groups = static_cast<int32_t>(lists_.groups.size());
  table.runs = static_cast<int32_t>(lists_.runs.size());
  std::vector<int32_t> shifts;
  shifts.reserve(columns_.size());
  for (const Stretch& stretch : columns_) {
    shifts.push_back(stretch.shift);
  }
  table.stretches = static_cast<int32_t>(shifts.size());
  table.class_heads_at = append(words, class_heads());
  table.span_tiles_at = append(words, cut_->span_tiles);
  table.shifts_at = append(words, shifts);
  table.windows_at = static_cast<int32_t>(words.size());
  const size_t bytes = static_cast<size_t>(cut_->tiles) * sizeof(Tile) +
                       lists_.groups.size() * sizeof(Group) + lists_.runs.size() * sizeof(Run);
  words.reserve(words.size() + (1 + tables_to_come) * bytes / sizeof(int32_t));
  table.tiles_at = static_cast<int32_t>(words.size());
  words.resize(words.size() + static_cast<size_t>(cut_->tiles) * sizeof(Tile) / sizeof(int32_t));
  align(words);
  auto* tile = reinterpret_cast<Tile*>(words.data() + table.tiles_at);
  for (size_t s = 0; s + 1 < cells_.spans.size(); ++s) {
    tile = write_span(cells_.spans[s], cells_.spans[s + 1], s + 2 == cells_.spans.size(), tile);
  }
  note_tiling(cut_->row_tile, computed_, table);
  table.groups_at = append(words, lists_.groups);
  table.runs_at = append(words, lists_.runs);
  return table;
}

}  // namespace dilated::pattern

// The height of a pattern's tiles: tall ones, or short ones where tall ones would stay empty.
#pragma once

#include <dilated/pattern.h>
#include <dilated/pattern_layout.h>

#include <cstdint>
#include <vector>

namespace dilated::pattern {

/// Pairs that tiles compute, their empty corners included; causality is left out.
struct Computed {
  double tall = 0;  // in tiles of kRowTile rows
  double low = 0;   // of kShortRowTile

  void add(const Computed& other, int64_t times = 1) {
    tall += static_cast<double>(times) * other.tall;
    low += static_cast<double>(times) * other.low;
  }
};

/// Of a group of `rows` that have the same `columns`.
Computed computed_pairs(int64_t rows, int64_t columns);

/// kRowTile or kShortRowTile, whichever takes less time.
int64_t choose_row_tile(const Computed& computed);

/// Says in a table how it is cut.
void note_tiling(int64_t row_tile, const Computed& computed, Table& table);

/// A table's tiles and how many come before each span (Table::span_tiles_at).
struct TileList {
  std::vector<Tile> tiles;
  std::vector<int32_t> span_tiles;
};

/// The table's tiles, cut to another height.
TileList cut_again(const TableView& table, int64_t row_tile);

}  // namespace dilated::pattern

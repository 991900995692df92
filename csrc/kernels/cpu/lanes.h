// The rows of a tile, as vector lanes: in panels of 64, up to four of which share each chunk of
// columns.
//
// Forward and in the backward over queries, lanes are queries and columns are keys; in the backward
// over keys it is the other way round. Causality is one comparison in all three: a pair exists iff
// lane order >= column order, where the order of a position p is p, or -p in the backward over
// keys.
#pragma once

#include <dilated/pattern_layout.h>

#include "kernels/cpu/simd.h"

namespace dilated::kernels::cpu::DILATED_ISA {

inline constexpr int kPanels = 4;
inline constexpr int32_t kLastPosition = 0x7ffffffe;  // count_through() may add one to it

/// The rows of one panel.
template <typename T>
struct Lanes {
  using Int = typename Simd<T>::Int;

  int rows, vectors;  // vectors that hold the rows; lanes past the last row repeat it
  int32_t low, high;  // smallest and largest position
  int32_t position[kPanelRows];
  alignas(64) Int order[kPanelRows];
  alignas(64) uint32_t hash[kPanelRows];  // dropout: xor with a column's gives what mix32 mixes
  alignas(64) T lse[kPanelRows];          // of queries, as Columns::lse
  alignas(64) T delta[kPanelRows];        // of queries, as Columns::delta
  Int lowest;                             // order
  Int highest[kPanelRows];                // likewise, within each vector

  /// Rows first .. first + count - 1 of the group's row runs.
  void place(const TableView& table, const Group& group, int32_t origin, int32_t first,
             int32_t count, bool reversed) {
    rows = count;
    vectors = (count + kLanes<T> - 1) / kLanes<T>;
    const Run* run = table.runs() + group.row_runs;
    for (int lane = 0; lane < count; ++run) {
      for (int32_t j = first; j < run->count && lane < count; ++j) {
        position[lane++] = origin + run->start + run->stride * j;
      }
      first = first > run->count ? first - run->count : 0;
    }
    low = high = position[0];
    for (int lane = 0; lane < kPanelRows; ++lane) {
      position[lane] = position[lane < count ? lane : count - 1];
      low = position[lane] < low ? position[lane] : low;
      high = position[lane] > high ? position[lane] : high;
      order[lane] = reversed ? -position[lane] : position[lane];
      hash[lane] = 0;
      lse[lane] = delta[lane] = 0;
    }
    lowest = reversed ? -high : low;
    for (int v = 0; v < vectors; ++v) {
      highest[v] = order[v * kLanes<T>];
      for (int lane = 1; lane < kLanes<T>; ++lane) {
        const Int other = order[v * kLanes<T> + lane];
        highest[v] = other > highest[v] ? other : highest[v];
      }
    }
  }
};

/// The panels of a task.
template <typename T>
struct Panels {
  int count;
  int32_t low, high;  // smallest and largest position
  Lanes<T> lanes[kPanels];

  void place(const TableView& table, const Group& group, const Tile& tile, int32_t first,
             bool reversed) {
    low = kLastPosition;
    high = 0;
    for (count = 0; count < kPanels && first < tile.rows; ++count, first += kPanelRows) {
      const int32_t rest = tile.rows - first;
      Lanes<T>& panel = lanes[count];
      panel.place(table, group, tile.origin, tile.first_row + first,
                  rest < kPanelRows ? rest : kPanelRows, reversed);
      low = panel.low < low ? panel.low : low;
      high = panel.high > high ? panel.high : high;
    }
  }
};

}  // namespace dilated::kernels::cpu::DILATED_ISA

// The rows of a tile, as vector lanes: in panels of 64, up to four of which share each chunk of
// columns.
//
// In the forward and in the backward over queries, lanes are queries and columns are keys; in the
// backward over keys it is the other way round. In all three a row sees the columns at first <=
// position <= last. Causality makes a query's position its last, a key's its first; a row's window
// may narrow this further.
#pragma once

#include <dilated/pattern_layout.h>

#include "kernels/cpu/simd.h"

namespace dilated::kernels::cpu::DILATED_ISA {

inline constexpr int kPanels = 4;
inline constexpr int32_t kLastPosition = 0x7ffffffe;  // count_through() may add one to it

/// The rows of a task as the table lists them.
struct RowList {
  TableView table;
  const Group& group;
  const Tile& tile;  // the task's, which may have more rows than row_tile
  bool is_causal, over_keys;

  /// What the row at a position sees. `row` counts from the tile's first.
  Window window(int32_t row, int32_t position) const {
    Window window{is_causal && over_keys ? position : 0,
                  is_causal && !over_keys ? position : kLastPosition};
    if (tile.first_window >= 0) {
      const Window& own = table.windows()[tile.first_window + row];
      window.first = own.first > window.first ? own.first : window.first;
      window.last = own.last < window.last ? own.last : window.last;
    }
    return window;
  }
};

/// Columns that some rows see, and those that all of them do, which may be none.
struct Windows {
  Window some{kLastPosition, 0}, all{0, kLastPosition};

  void add(const Window& window) {
    some.first = window.first < some.first ? window.first : some.first;
    some.last = window.last > some.last ? window.last : some.last;
    all.first = window.first > all.first ? window.first : all.first;
    all.last = window.last < all.last ? window.last : all.last;
  }
  void add(const Windows& windows) {
    add(windows.some);
    all.first = windows.all.first > all.first ? windows.all.first : all.first;
    all.last = windows.all.last < all.last ? windows.all.last : all.last;
  }
};

/// The rows of one panel.
template <typename T>
struct Lanes {
  using Int = typename Simd<T>::Int;

  int rows, vectors;  // vectors that hold the rows; lanes past the last row repeat it
  Windows windows;
  Windows vector_windows[kPanelRows / kLanes<T>];
  int32_t position[kPanelRows];
  alignas(64) Int first[kPanelRows];      // of each lane's window
  alignas(64) Int last[kPanelRows];       // likewise
  alignas(64) uint32_t hash[kPanelRows];  // dropout: mix32 mixes it xor the column's
  alignas(64) T lse[kPanelRows];          // of queries, as Columns::lse
  alignas(64) T delta[kPanelRows];        // of queries, as Columns::delta

  /// Rows begin .. begin + count - 1 of the list.
  void place(const RowList& list, int32_t begin, int32_t count) {
    rows = count;
    vectors = (count + kLanes<T> - 1) / kLanes<T>;
    read_positions(list, list.tile.first_row + begin);
    windows = {};
    for (int v = 0; v < vectors; ++v) {
      vector_windows[v] = {};
      for (int lane = v * kLanes<T>; lane < (v + 1) * kLanes<T>; ++lane) {
        const int row = lane < count ? lane : count - 1;
        position[lane] = position[row];
        const Window window = list.window(begin + row, position[lane]);
        first[lane] = window.first;
        last[lane] = window.last;
        vector_windows[v].add(window);
        hash[lane] = 0;
        lse[lane] = delta[lane] = 0;
      }
      windows.add(vector_windows[v]);
    }
  }

 private:
  void read_positions(const RowList& list, int32_t skipped) {
    const Run* run = list.table.runs() + list.group.row_runs;
    for (int lane = 0; lane < rows; ++run) {
      for (int32_t j = skipped; j < run->count && lane < rows; ++j) {
        position[lane++] = list.tile.origin + run->start + run->stride * j;
      }
      skipped = skipped > run->count ? skipped - run->count : 0;
    }
  }
};

/// The panels of a task.
template <typename T>
struct Panels {
  int count;
  Windows windows;
  Lanes<T> lanes[kPanels];

  /// Rows begin .. of the list, as many as there is room for.
  void place(const RowList& list, int32_t begin) {
    windows = {};
    for (count = 0; count < kPanels && begin < list.tile.rows; ++count, begin += kPanelRows) {
      const int32_t rest = list.tile.rows - begin;
      lanes[count].place(list, begin, rest < kPanelRows ? rest : kPanelRows);
      windows.add(lanes[count].windows);
    }
  }
};

}  // namespace dilated::kernels::cpu::DILATED_ISA

// The lists of a tile as a block keeps them in shared memory: its rows, and its keys, a tile of
// them at a time.
//
// A row sees the columns in its window: those up to its own position if causal (from it on, where
// rows are keys), and within the window that the pattern gives it, if any.
#pragma once

#include <climits>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/primitives/columns.cuh"
#include "kernels/cuda/primitives/score.cuh"
#include "kernels/cuda/primitives/work.cuh"
#include "kernels/dropout.h"

namespace dilated::kernels::cuda {

/// A tile of keys as listed; past the end of the list their weight is 0.
template <int kKeys>
struct alignas(16) KeyTile {
  int32_t position[kKeys];
  int32_t place[kKeys];
  float bias[kKeys];  // log of the multiplicity; -inf past the end of the list
  float plain_bias_log2;
  int32_t is_plain;   // every row sees all keys, and with the same multiplicity, of this base-2
                      // logarithm throughout
  int32_t is_masked;  // some row does not see some key
  int32_t reserved;
};

/// The rows of a tile; past the group's last one that row is repeated.
template <int kRows>
struct alignas(16) RowTileList {
  int32_t position[(kRows + 31) / 32 * 32];  // as warps list them, 32 at a time
  const Window* windows;  // of the first row, the others' follow; nullptr: rows have none
  int32_t count;
};

/// Windows of several rows: what some see, and what all do.
struct Windows {
  Window some{INT_MIN, INT_MAX}, all{INT_MIN, INT_MAX};
};

/// Whether any row of the tile may see less than the whole list.
__device__ inline bool has_windows(const WorkItem& work, const AttentionArgs& args) {
  return args.is_causal || work.tile.first_window >= 0;
}

/// The columns that a row sees. over_keys: rows are keys.
__device__ inline Window window_of(const Window* own, int32_t position, bool is_causal,
                                   bool over_keys) {
  Window window{is_causal && over_keys ? position : INT_MIN,
                is_causal && !over_keys ? position : INT_MAX};
  if (own != nullptr) {
    window.first = max(window.first, __ldg(&own->first));
    window.last = min(window.last, __ldg(&own->last));
  }
  return window;
}

template <int kRows>
__device__ inline Window window_of(const RowTileList<kRows>& rows, int row, bool is_causal,
                                   bool over_keys) {
  const Window* own = rows.windows == nullptr ? nullptr : rows.windows + min(row, rows.count - 1);
  return window_of(own, rows.position[row], is_causal, over_keys);
}

/// Nullptr: the tile's rows have none.
__device__ inline const Window* own_windows(const TableView& table, const WorkItem& work) {
  return work.tile.first_window < 0 ? nullptr : table.windows() + work.tile.first_window;
}

/// Over the lanes of a warp, all of which call it and get the same. Lane l holds rows l, l + 32, ..
template <int kPerLane>
__device__ inline Windows join_windows(const Window (&windows)[kPerLane]) {
  Windows joined{{INT_MAX, INT_MIN}, {INT_MIN, INT_MAX}};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    joined.some.first = min(joined.some.first, windows[i].first);
    joined.some.last = max(joined.some.last, windows[i].last);
    joined.all.first = max(joined.all.first, windows[i].first);
    joined.all.last = min(joined.all.last, windows[i].last);
  }
  joined.some.first = __reduce_min_sync(kAllLanes, joined.some.first);
  joined.some.last = __reduce_max_sync(kAllLanes, joined.some.last);
  joined.all.first = __reduce_max_sync(kAllLanes, joined.all.first);
  joined.all.last = __reduce_min_sync(kAllLanes, joined.all.last);
  return joined;
}

__device__ inline ColumnCursor cursor_of(const TableView& table, const WorkItem& work,
                                         const Window& window) {
  return ColumnCursor(table.runs() + work.group.column_runs, work.group.column_run_count,
                      work.tile.origin, table.shifts() + work.tile.first_stretch, window);
}

/// Of the group's rows; places mean nothing.
__device__ inline ColumnCursor row_cursor_of(const TableView& table, const WorkItem& work) {
  return ColumnCursor(table.runs() + work.group.row_runs, work.group.row_run_count,
                      work.tile.origin, table.shifts(), Window{INT_MIN, INT_MAX});
}

/// How many columns of the list lie in the window. All lanes of a warp call it and get the same.
__device__ inline int32_t count_columns(const TableView& table, const WorkItem& work,
                                        const Window& window) {
  const Run* runs = table.runs() + work.group.column_runs;
  int32_t count = 0;
  for (int32_t run = threadIdx.x % 32; run < work.group.column_run_count; run += 32) {
    count += load_clipped(runs + run, work.tile.origin, window).count;
  }
  return static_cast<int32_t>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(count)));
}

/// What mixes with a key's position to say whether dropout keeps the pair.
__device__ inline uint32_t row_dropout_key(const AttentionArgs& args, const WorkItem& work,
                                           int32_t position) {
  return dropout_row_key(__ldg(args.dropout.seed), work.entry(), work.head, position);
}

/// Lists the group's rows from the tile's first_row on: `warps` warps, 32 rows at a time each.
template <int kRows>
__device__ inline void read_rows(const TableView& table, const WorkItem& work, int warps,
                                 RowTileList<kRows>& rows) {
  const int lane = threadIdx.x % 32;
  for (int first = threadIdx.x / 32 * 32; first < kRows; first += warps * 32) {
    ColumnCursor cursor = row_cursor_of(table, work);
    Column row[1];
    cursor.read(work.tile.first_row + first, row);
    rows.position[first + lane] = row[0].position;
  }
  if (threadIdx.x == 0) {
    rows.windows = own_windows(table, work);
    rows.count = min(work.group.rows - work.tile.first_row, kRows);
  }
}

/// What the rows see together. All lanes of a warp call it and get the same.
template <int kRows>
__device__ inline Windows windows_of(const RowTileList<kRows>& rows, bool is_causal,
                                     bool over_keys) {
  constexpr int kPerLane = (kRows + 31) / 32;
  Window windows[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    windows[i] = window_of(rows, (threadIdx.x % 32 + 32 * i) % kRows, is_causal, over_keys);
  }
  return join_windows(windows);
}

/// The keys that a tile of queries walks or, where rows are keys, the queries.
struct KeyList {
  Windows windows;  // of the rows
  int32_t columns;
};

/// The whole block: reads the rows and finds their columns.
template <int kRows>
__device__ inline KeyList begin_rows(const TableView& table, const WorkItem& work,
                                     const AttentionArgs& args, RowTileList<kRows>& rows,
                                     bool over_keys = false) {
  read_rows(table, work, blockDim.x / 32, rows);
  __syncthreads();
  KeyList keys{Windows{}, work.group.columns};
  if (has_windows(work, args)) {
    keys.windows = windows_of(rows, args.is_causal, over_keys);
    keys.columns = count_columns(table, work, keys.windows.some);
  }
  return keys;
}

/// One warp: lists columns as ColumnCursor::read() gave them. Those outside `all` are those that
/// some row does not see.
template <int kPerLane>
__device__ inline void list_columns(const Column (&columns)[kPerLane], bool one_run,
                                    const Window& all, KeyTile<32 * kPerLane>& keys) {
  const int lane = threadIdx.x % 32;
  bool is_masked = false, differs = false;
  if (!one_run) {
    const uint32_t multiplicity = __shfl_sync(kAllLanes, columns[0].multiplicity(), 0);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      differs = differs || columns[i].multiplicity() != multiplicity;
    }
    differs = __any_sync(kAllLanes, differs);
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    keys.position[i * 32 + lane] = columns[i].position;
    keys.place[i * 32 + lane] = columns[i].place;
    keys.bias[i * 32 + lane] = columns[i].log_multiplicity();
    is_masked = is_masked || !sees(all, columns[i].position);
  }
  is_masked = __any_sync(kAllLanes, is_masked);
  if (lane == 0) {
    keys.plain_bias_log2 = columns[0].log2_multiplicity();
    keys.is_plain = !differs && !is_masked;
    keys.is_masked = is_masked;
  }
}

/// One warp: lists the next key tile.
template <int kKeys>
__device__ inline void read_keys(ColumnCursor& cursor, int32_t first, const Window& all,
                                 KeyTile<kKeys>& keys) {
  Column columns[kKeys / 32];
  const bool one_run = cursor.read(first, columns);
  list_columns(columns, one_run, all, keys);
}

}  // namespace dilated::kernels::cuda

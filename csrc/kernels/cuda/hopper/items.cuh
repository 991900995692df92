// What blocks work on, and how they hand it from warp to warp.
#pragma once

#include <cstdint>

#include "kernels/cuda/hopper/barrier.cuh"
#include "kernels/cuda/hopper/slots.cuh"
#include "kernels/cuda/primitives/async_copy.cuh"
#include "kernels/cuda/primitives/lists.cuh"

namespace dilated::kernels::cuda::hopper {

inline constexpr int kMostGroups = 2;  // warpgroups that compute
inline constexpr int kComputingWarps = 4 * kMostGroups;
inline constexpr int kItemReaders = kComputingWarps + 3;  // and the warps that copy

/// Which of the warpgroups that compute this thread is in; from a shuffle, as in describe().
__device__ inline int computing_group() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 128), 0) - 1;
}

/// Full: whoever fills it is done; empty: all who read it are.
struct Handover {
  Barrier full, empty;
};

template <int kCount>
__device__ void init(Handover (&turns)[kCount], int full, int empty) {
  for (Handover& turn : turns) {
    turn.full.init(full);
    turn.empty.init(empty);
  }
}

/// Which buffer of `count` is next, and in which round.
struct Turn {
  int count;
  int index = 0;
  uint32_t round = 0;  // modulo 2

  __device__ void advance() {
    if (++index == count) {
      index = 0;
      round ^= 1;
    }
  }
  __device__ uint32_t full_parity() const { return round; }
  __device__ uint32_t empty_parity() const { return round ^ 1; }
};

/// That of the number-th use of `kCount` buffers.
template <int kCount>
__device__ inline Turn turn_at(uint32_t number) {
  return {kCount, static_cast<int>(number % kCount), number / kCount % 2};
}

/// How warpgroups share an item.
enum class Sharing : int8_t {
  kRows,     // each has half of the rows, and all columns
  kColumns,  // each has all rows, which are no more than it takes, and every other tile of columns
  kNothing,  // each has rows of its own group, of the same head and sequence, and their columns
  kLast,     // there are no more items, and this is none
};

/// Columns to walk along.
struct ColumnList {
  int32_t runs, run_count;  // as Group has them
  int32_t origin;
  int32_t tiles;
  Window seen;  // by some row
};

/// Rows to compute, and what is known of their columns.
template <int kRows, int kGroups, bool kTakesTwoGroups_>
struct alignas(16) Item {
  static constexpr bool kTakesTwoGroups = kTakesTwoGroups_;

  RowTileList<kRows> rows;
  WorkItem work;                                // of the first warpgroup's rows
  Windows windows[kGroups];                     // of each warpgroup's rows
  ColumnList columns[kTakesTwoGroups ? 2 : 1];  // the second one where groups share nothing
  Sharing sharing;
  int8_t row_count[kGroups];  // of each warpgroup's rows those that exist
};

/// Tiles of columns, over all of its lists.
template <typename Item>
__device__ int32_t count_tiles(const Item& item) {
  int32_t tiles = item.columns[0].tiles;
  if constexpr (Item::kTakesTwoGroups) {
    tiles += item.sharing == Sharing::kNothing ? item.columns[1].tiles : 0;
  }
  return tiles;
}

/// How many slots the columns in the window take. All lanes of a warp call it and get the same.
__device__ inline int32_t count_slots(const ListStrides& strides, const TableView& table,
                                      const WorkItem& work, const Window& window) {
  const Run* runs = table.runs() + work.group.column_runs;
  int32_t slots = 0;
  for (int32_t i = threadIdx.x % 32; i < work.group.column_run_count; i += 32) {
    int32_t map;
    const ClippedRun run = load_slots(strides, runs + i, work.tile.origin, window, map);
    slots += SlotCursor::slots_of(run, map);
  }
  return static_cast<int32_t>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(slots)));
}

/// What lists items.
struct Lister {
  const AttentionArgs& args;
  const ListStrides& strides;
  unsigned long long* counter;
  TableView table;
  bool over_keys;  // rows are keys
};

/// Rows of the group from the tile's first one on.
__device__ inline int32_t rows_left(const WorkItem& work) {
  return work.group.rows - work.tile.first_row;
}

/// Whether the tile can be the second warpgroup's, beside an item that the first one could take
/// alone: what rows know of their group is the same, and neither waits long for the other.
template <typename Shape>
__device__ bool goes_beside(const WorkItem& work, const typename Shape::RowItem& item) {
  constexpr int32_t kMostColumns = 8 * Shape::kColumns;  // that may be between them
  const WorkItem& first = item.work;
  return rows_left(work) <= Shape::kGroupRows && work.head == first.head &&
         work.batch == first.batch && work.tile.sequence == first.tile.sequence &&
         work.tile.row_shift == first.tile.row_shift &&
         work.tile.first_stretch == first.tile.first_stretch &&
         max(work.tile.first_window, first.tile.first_window) < 0 &&
         work.group.zero_keys == first.group.zero_keys &&
         abs(work.group.columns - first.group.columns) <= kMostColumns;
}

/// One warp: the tile's rows, what they see and how many tiles of columns that takes. It becomes
/// the item or, part 1, the second warpgroup's part of it.
template <typename Shape>
__device__ void list_tile(const Lister& lister, const WorkItem& work, int part,
                          typename Shape::RowItem& item) {
  const auto& [args, strides, counter, table, over_keys] = lister;
  const int lane = threadIdx.x % 32;
  const int32_t rows = rows_left(work);
  const bool is_alone = rows <= Shape::kGroupRows;  // one warpgroup could take all rows
  const int begin = part * Shape::kGroupRows;
  __syncwarp();
  if (lane == 0 && part == 0) {
    item.work = work;
    item.rows.windows = own_windows(table, work);
    item.rows.count = min(rows, Shape::kRows);
  }
#pragma unroll 1
  for (int first = begin; first < Shape::kRows; first += 32) {
    ColumnCursor cursor = row_cursor_of(table, work);
    Column row[1];
    cursor.read(work.tile.first_row + first - begin, row);
    item.rows.position[first + lane] = row[0].position;
  }
  __syncwarp();
  Windows windows[Shape::kGroups];
  if (has_windows(work, args)) {
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      const int first = (is_alone ? begin : group * Shape::kGroupRows) + lane;
      const Window of_rows[2]{window_of(item.rows, first, args.is_causal, over_keys),
                              window_of(item.rows, first + 32, args.is_causal, over_keys)};
      windows[group] = join_windows(of_rows);
    }
  }
  const Window seen{min(windows[0].some.first, windows[1].some.first),
                    max(windows[0].some.last, windows[1].some.last)};
  const int32_t slots = count_slots(strides, table, work, seen);
  if (lane == 0) {
    item.columns[part] = {work.group.column_runs, work.group.column_run_count, work.tile.origin,
                          (slots + Shape::kSlots - 1) / Shape::kSlots, seen};
    item.windows[part] = windows[0];  // of a part of its own both are alike
    item.windows[1] = windows[1];
    item.row_count[part] = static_cast<int8_t>(min(rows, Shape::kGroupRows));
    if (part == 0) {
      item.row_count[1] =
          static_cast<int8_t>(is_alone ? rows : min(rows - Shape::kGroupRows, Shape::kGroupRows));
    }
    item.sharing = part == 1 ? Sharing::kNothing : is_alone ? Sharing::kColumns : Sharing::kRows;
  }
  __syncwarp();
}

/// The pair of tiles after `pair`. Lane 0 knows it, later than the others go on.
__device__ inline int64_t find_next_pair(unsigned long long* counter, int64_t pair) {
  if (counter == nullptr) {
    return pair + gridDim.x;
  }
  return threadIdx.x % 32 != 0 ? 0 : gridDim.x + static_cast<int64_t>(atomicAdd(counter, 1));
}

/// Blocks take pairs of tiles, of which the second one mostly comes with the first.
template <typename Shape, typename Memory>
__device__ void list_items(const Lister& lister, Memory& memory) {
  const TableView& table = lister.table;
  const int64_t batch = lister.args.batch;
  const int64_t tiles = count_work(table, batch);
  Turn turn{Shape::kItems};
  const auto begin = [&]() -> typename Shape::RowItem& {
    memory.item_turns[turn.index].empty.wait(turn.empty_parity());
    return memory.items[turn.index];
  };
  const auto end = [&] {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      memory.item_turns[turn.index].full.arrive();
    }
    turn.advance();
  };
#pragma unroll 1
  for (int64_t pair = blockIdx.x; 2 * pair < tiles;) {
    const int64_t next = find_next_pair(lister.counter, pair);
    bool is_open = false;  // an item beside which there is room
#pragma unroll 1
    for (int64_t tile = 2 * pair; tile < min(2 * pair + 2, tiles); ++tile) {
      WorkItem work;
      if (!find_work(table, tile, batch, work) || work.tile.first_row % Shape::kRows != 0) {
        continue;
      }
      const bool is_beside = is_open && goes_beside<Shape>(work, memory.items[turn.index]);
      if (is_open && !is_beside) {
        end();
      }
      list_tile<Shape>(lister, work, is_beside ? 1 : 0, begin());
      is_open = Shape::kTakesTwoGroups && !is_beside && rows_left(work) <= Shape::kGroupRows;
      if (!is_open) {
        end();
      }
    }
    if (is_open) {
      end();
    }
    pair = __shfl_sync(kAllLanes, next, 0);
  }
  begin().sharing = Sharing::kLast;
  end();
}

/// One warp: what its copies and stores wrote is there, for tensor cores too.
__device__ inline void publish_copies() {
  commit_copies();
  wait_for_copies<0>();
  publish_to_async_proxy();
  __syncwarp();
}

/// One warp, which copies: visit(item, where it is in the ring) for each item until the last.
template <typename Shape, typename Memory, typename Visit>
__device__ void for_each_item(Memory& memory, const Visit& visit) {
  Turn items{Shape::kItems};
#pragma unroll 1
  for (;;) {
    memory.item_turns[items.index].full.wait(items.full_parity());
    const typename Shape::RowItem& item = memory.items[items.index];
    if (item.sharing == Sharing::kLast) {
      return;
    }
    visit(item, items);
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      memory.item_turns[items.index].empty.arrive();
    }
    items.advance();
  }
}

/// A block: the first warpgroup produces, the others compute, on shared memory whose barriers
/// init_barriers() sets up.
template <typename Memory, typename Produce, typename Compute>
__device__ void run_block(const Produce& produce, const Compute& compute) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  uint32_t start = (shared_address(bytes) + 1023) / 1024 * 1024;
  // Else the compiler finds out anew, at every access, where the block's memory is in its
  // cluster's.
  asm volatile("" : "+r"(start));
  auto& memory = *static_cast<Memory*>(__cvta_shared_to_generic(start));
  if (threadIdx.x == 0) {
    init_barriers(memory);
    publish_barriers();
  }
  __syncthreads();
  constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  if (threadIdx.x < 128) {
    give_registers<kProducerRegisters>();
    produce(memory);
  } else {
    take_registers<kConsumerRegisters>();
    compute(memory);
  }
}

}  // namespace dilated::kernels::cuda::hopper

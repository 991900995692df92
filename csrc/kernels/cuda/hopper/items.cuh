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

/// Rows to compute, and what is known of their columns.
template <int kRows, int kGroups>
struct alignas(16) Item {
  RowTileList<kRows> rows;
  WorkItem work;
  Windows windows[kGroups];  // of each warpgroup's rows
  Window seen;               // by some row
  int32_t column_tiles;
  int32_t is_split;  // warpgroups share columns instead of rows
  int32_t is_last;   // there are no more items, and this is none
};

/// How many slots the columns in the window take. All lanes of a warp call it and get the same.
__device__ inline int32_t count_slots(const ListStrides& strides, const TableView& table,
                                      const WorkItem& work, const Window& window) {
  const Run* runs = table.runs() + work.group.column_runs;
  int32_t slots = 0;
  for (int32_t i = threadIdx.x % 32; i < work.group.column_run_count; i += 32) {
    const ClippedRun run = load_clipped(runs + i, work.tile.origin, window);
    slots += SlotCursor::slots_of(run, find_stride(strides, run.stride));
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

/// One warp: the tile's rows, what they see and how many tiles of columns that takes.
template <typename Shape>
__device__ void list_item(const Lister& lister, const WorkItem& work,
                          typename Shape::RowItem& item) {
  const int lane = threadIdx.x % 32;
  const auto& [args, strides, counter, table, over_keys] = lister;
  __syncwarp();
  if (lane == 0) {
    item.work = work;
    item.rows.windows = own_windows(table, work);
    item.rows.count = min(work.group.rows - work.tile.first_row, Shape::kRows);
    item.is_last = false;
  }
#pragma unroll 1
  for (int first = 0; first < Shape::kRows; first += 32) {
    ColumnCursor cursor = row_cursor_of(table, work);
    Column row[1];
    cursor.read(work.tile.first_row + first, row);
    item.rows.position[first + lane] = row[0].position;
  }
  __syncwarp();
  const bool is_split = work.group.rows - work.tile.first_row <= Shape::kGroupRows;
  Windows windows[Shape::kGroups];
  if (has_windows(work, args)) {
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      const int first = (is_split ? 0 : group * Shape::kGroupRows) + lane;
      const Window rows[2]{window_of(item.rows, first, args.is_causal, over_keys),
                           window_of(item.rows, first + 32, args.is_causal, over_keys)};
      windows[group] = join_windows(rows);
    }
  }
  const Window seen{min(windows[0].some.first, windows[1].some.first),
                    max(windows[0].some.last, windows[1].some.last)};
  const int32_t slots = count_slots(strides, table, work, seen);
  if (lane == 0) {
    item.windows[0] = windows[0];
    item.windows[1] = windows[1];
    item.seen = seen;
    item.column_tiles = (slots + Shape::kSlots - 1) / Shape::kSlots;
    item.is_split = is_split;
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
  const auto fill = [&](const auto& write) {
    Handover& handover = memory.item_turns[turn.index];
    handover.empty.wait(turn.empty_parity());
    write(memory.items[turn.index]);
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      handover.full.arrive();
    }
    turn.advance();
  };
#pragma unroll 1
  for (int64_t pair = blockIdx.x; 2 * pair < tiles;) {
    const int64_t next = find_next_pair(lister.counter, pair);
#pragma unroll 1
    for (int64_t tile = 2 * pair; tile < min(2 * pair + 2, tiles); ++tile) {
      WorkItem work;
      if (find_work(table, tile, batch, work) && work.tile.first_row % Shape::kRows == 0) {
        fill([&](typename Shape::RowItem& item) { list_item<Shape>(lister, work, item); });
      }
    }
    pair = __shfl_sync(kAllLanes, next, 0);
  }
  fill([&](typename Shape::RowItem& item) { item.is_last = true; });
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
    if (item.is_last) {
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

// Backward pass for 16-bit elements with mma.sync, for any GPU from sm_80 on.
//
// A block keeps a tile of keys and their values in shared memory and walks the list of queries that
// meet them, 64 at a time, whatever branch and whatever head of the KV group they come from:
//
//   grad_value += P^T dO,  grad_key += dS^T Q     in registers over the whole list, written once
//   grad_query += dS K                            added to float32 sums in memory, 64 rows a tile
//
//   iteration i | wait for tile i | barrier | copy tile i + 1, list tile i + 2 | scores | barrier |
//   grad_query |
#pragma once

#include "kernels/cuda/portable/backward_warp.cuh"
#include "kernels/cuda/primitives/async_copy.cuh"

namespace dilated::kernels::cuda::portable {

/// One warp: takes the next item that has rows for this block and lists its keys. is_done if there
/// is none.
template <typename Shape>
__device__ void take_item(const BackwardCall& call, const PatternView& pattern,
                          BackwardMemory<Shape>& memory) {
  const TableView table = pattern.transposed();
  const int64_t items = count_work(table, call.args.batch);
  const int lane = threadIdx.x % 32;
  WorkItem work{};
  bool is_found = false;
  // A block may take several of the pattern's tiles at once: the rest of the group's rows come with
  // the first.
  while (!is_found) {
    const unsigned long long taken = lane == 0 ? atomicAdd(call.next, 1ull) : 0;
    const auto item = static_cast<int64_t>(__shfl_sync(kAllLanes, taken, 0));
    if (item >= items) {
      memory.is_done = 1;
      return;
    }
    is_found =
        find_work(table, item, call.args.batch, work) && work.tile.first_row % Shape::kKeys == 0;
  }
  read_rows(table, work, 1, memory.keys);
  __syncwarp();
  BackwardItem item{work, work.group.columns, Windows{}};
  if (has_windows(work, call.args)) {
    item.windows = windows_of(memory.keys, call.args.is_causal, /*over_keys=*/true);
    item.columns = count_columns(table, work, item.windows.some);
  }
  memory.item = item;
  memory.is_done = 0;
  *reinterpret_cast<ColumnCursor*>(memory.cursor) = cursor_of(table, work, item.windows.some);
}

/// One warp, any: lists the queries of a tile. Tiles must be listed in order.
template <typename Shape>
__device__ void list_queries(const BackwardCall& call, BackwardMemory<Shape>& memory,
                             int32_t tile) {
  read_columns(call, memory.item, tile * Shape::kQueries, memory.keys.count < Shape::kKeys,
               *reinterpret_cast<ColumnCursor*>(memory.cursor), memory.columns[tile % 3]);
  __syncwarp();
}

template <typename Shape>
__device__ void copy_queries(const BackwardCall& call, BackwardMemory<Shape>& memory,
                             int32_t tile) {
  const BackwardArgs& args = call.args;
  const auto source = [&](const Rows& rows) { return row_source(rows.data, rows, args.head_dim); };
  const int stage = tile % call.stages;
  const QueryColumns<Shape::kQueries>& columns = memory.columns[tile % 3];
  Shape::Queries::copy({shared_address(memory.query(stage))}, columns.query_offset,
                       {source(args.query)});
  Shape::Queries::copy({shared_address(memory.grad_out(stage))}, columns.grad_out_offset,
                       {source(args.grad_out)});
}

template <typename Shape>
__device__ void copy_keys(const BackwardCall& call, BackwardMemory<Shape>& memory) {
  const WorkItem& work = memory.item.work;
  const auto source = [&](const Rows& rows) {
    return row_source(row_at<uint16_t>(rows, work.batch, work.tile.row_shift, work.head), rows,
                      call.args.head_dim);
  };
  Shape::Keys::copy({shared_address(memory.key), shared_address(memory.value)},
                    memory.keys.position, {source(call.args.key), source(call.args.value)});
}

template <typename Shape>
__device__ void backward_item(const BackwardCall& call, BackwardMemory<Shape>& memory) {
  // Read anew each time: a register that holds the count would be one too many at width 64.
  const auto has_tile = [&](int32_t tile) {
    return tile * Shape::kQueries < static_cast<volatile int32_t&>(memory.item.columns);
  };
  const int warp_index = threadIdx.x / 32;
  copy_keys(call, memory);
  if (warp_index == 0 && has_tile(0)) {
    list_queries(call, memory, 0);
    if (has_tile(1)) {
      list_queries(call, memory, 1);
    }
    commit_copies();
    wait_for_copies<0>();
    __syncwarp();
    finish_columns(memory.columns[0]);
  }
  __syncthreads();
  if (has_tile(0)) {
    copy_queries(call, memory, 0);
  }
  commit_copies();
  BackwardWarp<Shape> warp(call, memory);
#pragma unroll 1
  for (int32_t tile = 0; has_tile(tile); ++tile) {
    const int stage = tile % call.stages;
    wait_for_copies<0>();
    __syncthreads();
    if (has_tile(tile + 1)) {
      if (call.stages == 2) {
        copy_queries(call, memory, tile + 1);
      }
      if (warp_index == tile % Shape::kWarps) {
        finish_columns(memory.columns[(tile + 1) % 3]);
        if (has_tile(tile + 2)) {
          list_queries(call, memory, tile + 2);
        }
      }
      commit_copies();
    }
    warp.weigh(stage, memory.columns[tile % 3]);
    __syncthreads();
    if (call.grad_query.data != nullptr) {
      warp.add_grad_query(memory.columns[tile % 3]);
    }
    if constexpr (Shape::kParts > 1) {
      warp.accumulate_part(stage);
    }
    if (call.stages == 1 && has_tile(tile + 1)) {
      __syncthreads();
      copy_queries(call, memory, tile + 1);
      commit_copies();
    }
  }
  wait_for_copies<0>();
  warp.finish();
}

template <typename Element, int kWidth, int kKeys>
__global__ void __launch_bounds__(BackwardShape<Element, kWidth, kKeys>::kThreads,
                                  BackwardShape<Element, kWidth, kKeys>::kBlocks)
    attention_backward_kernel(const __grid_constant__ BackwardCall call) {
  using Shape = BackwardShape<Element, kWidth, kKeys>;
  extern __shared__ __align__(128) unsigned char bytes[];
  BackwardMemory<Shape>& memory = *reinterpret_cast<BackwardMemory<Shape>*>(bytes);
  const PatternView pattern{call.args.pattern};
  for (;;) {
    __syncthreads();
    if (threadIdx.x < 32) {
      take_item(call, pattern, memory);
    }
    __syncthreads();
    if (memory.is_done) {
      return;
    }
    backward_item(call, memory);
  }
}

}  // namespace dilated::kernels::cuda::portable

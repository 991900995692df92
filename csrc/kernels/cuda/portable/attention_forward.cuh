// Forward pass for 16-bit elements with mma.sync, for any GPU from sm_80 on.
//
// A block takes a tile of query rows and walks its list of keys, kKeys at a time. Key and value
// rows lie anywhere; their tiles are copied into one of two stages while the block computes on the
// other, and the positions for the copy after that are worked out by warp 0:
//
//   iteration i:  wait for tile i, barrier, start copying tile i + 1, list tile i + 2, compute on i
//
// Every row of the outputs is written once, by one block: no initialisation, no atomics.
#pragma once

#include "kernels/cuda/portable/forward_carry.cuh"
#include "kernels/cuda/portable/forward_warp.cuh"
#include "kernels/cuda/primitives/async_copy.cuh"

namespace dilated::kernels::cuda::portable {

/// Starts copying a listed tile of keys and values. kIsBlock: some may be far.
template <typename Shape, bool kIsBlock>
__device__ void copy_keys(const ForwardCall& call, ForwardMemory<Shape>& memory, int32_t tile) {
  const int32_t* places = memory.keys[tile % Shape::kLists].place;
  const ForwardArgs& args = call.args;
  const uint32_t tiles[]{shared_address(memory.key[tile % 2]),
                         shared_address(memory.value[tile % 2])};
  const RowSource near[]{row_source(memory.key_origin, args.key, args.head_dim),
                         row_source(memory.value_origin, args.value, args.head_dim)};
  bool is_copied = false;
  if constexpr (kIsBlock) {
    if (args.far_key.data != nullptr) {
      const auto with_far = [&](const RowSource& source, const Rows& far) {
        const WorkItem& work = memory.work;
        const auto* origin =
            row_at<uint16_t>(far, work.batch, 0, work.head / call.heads_per_key_head);
        return RowSources{source, row_source(origin, far, args.head_dim),
                          static_cast<int32_t>(args.keys)};
      };
      Shape::Keys::copy(tiles, places,
                        {with_far(near[0], args.far_key), with_far(near[1], args.far_value)});
      is_copied = true;
    }
  }
  if (!is_copied) {
    Shape::Keys::copy(tiles, places, near);
  }
  commit_copies();
}

/// Warp 0: lists key tile `tile`.
template <typename Shape>
__device__ void list_keys(ForwardMemory<Shape>& memory, int32_t tile) {
  read_keys(memory.cursor, tile * Shape::kKeys, memory.all, memory.keys[tile % Shape::kLists]);
  __syncwarp();
}

/// Before the loop: rows, the first two key tiles' lists, the copy of the queries under way.
template <typename Shape>
__device__ void begin_tile(const ForwardCall& call, const TableView& table,
                           ForwardMemory<Shape>& memory) {
  const ForwardArgs& args = call.args;
  const WorkItem& work = memory.work;
  const KeyList keys = begin_rows(table, work, args, memory.rows);
  const int32_t tiles = (keys.columns + Shape::kKeys - 1) / Shape::kKeys;
  if (threadIdx.x / 32 == 0) {
    memory.cursor = cursor_of(table, work, keys.windows.some);
    memory.all = keys.windows.all;
    memory.key_tiles = tiles;
    __syncwarp();
#pragma unroll 1
    for (int32_t tile = 0; tile < min(tiles, 2); ++tile) {
      list_keys(memory, tile);
    }
  }
  const auto* query = row_at<uint16_t>(args.query, work.batch, work.tile.row_shift, work.head);
  Shape::Query::copy({shared_address(memory.query)}, memory.rows.position,
                     {row_source(query, args.query, args.head_dim)});
  commit_copies();
  __syncthreads();
}

template <typename Element, typename Shape>
__device__ void carry_tile(const ForwardCall& call, const TableView& table,
                           ForwardMemory<Shape>& memory) {
  read_rows(table, memory.work, Shape::kWarps, memory.rows);
  __syncthreads();
  const WorkItem& work = memory.work;
  const int32_t rows = min(work.group.rows - work.tile.first_row, Shape::kRows);
  if (call.args.is_partial) {
    carry_rows<float>(call, work, memory.rows, rows);
  } else {
    carry_rows<Element>(call, work, memory.rows, rows);
  }
}

template <typename Element, typename Shape, bool kIsBlock>
__device__ void forward_tile(const ForwardCall& call, const TableView& table,
                             ForwardMemory<Shape>& memory) {
  if constexpr (kIsBlock) {
    if (is_carried(memory.work, call.args)) {
      carry_tile<Element>(call, table, memory);
      return;
    }
  }
  begin_tile(call, table, memory);
  if (memory.key_tiles > 0) {
    copy_keys<Shape, kIsBlock>(call, memory, 0);
  } else {
    commit_copies();  // so that the wait below is for the query here too
  }
  ForwardWarp<Element, Shape> warp(call, memory);
  wait_for_copies<1>();
  __syncthreads();
  warp.load_query();
  for (int32_t tile = 0; tile < memory.key_tiles; ++tile) {
    wait_for_copies<0>();
    __syncthreads();
    if (tile + 1 < memory.key_tiles) {
      copy_keys<Shape, kIsBlock>(call, memory, tile + 1);
    }
    if (threadIdx.x / 32 == 0 && tile + 2 < memory.key_tiles) {
      list_keys(memory, tile + 2);
    }
    warp.attend(tile % 2, memory.keys[tile % Shape::kLists], tile == 0);
  }
  const WorkItem& work = memory.work;
  const int32_t rows = min(work.group.rows - work.tile.first_row, Shape::kRows);
  warp.template finish<kIsBlock>(work, rows);
}

/// kIsBlock: the result continues another one, or will be continued, or there are far keys.
template <typename Element, typename Shape, bool kIsBlock>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    attention_forward_kernel(const __grid_constant__ ForwardCall call) {
  extern __shared__ __align__(128) unsigned char bytes[];
  ForwardMemory<Shape>& memory = *reinterpret_cast<ForwardMemory<Shape>*>(bytes);
  const TableView table = PatternView{call.args.pattern}.forward();
  if (threadIdx.x == 0) {
    memory.item = blockIdx.x;
  }
  __syncthreads();
  while (memory.item < count_work(table, call.args.batch)) {
    WorkItem work{};
    // A block may take several of the pattern's tiles at once: the rest of the group's rows come
    // with the first.
    const bool has_rows = find_work(table, memory.item, call.args.batch, work) &&
                          work.tile.first_row % Shape::kRows == 0;
    if (threadIdx.x == 0) {
      const int32_t key_head = work.head / call.heads_per_key_head;
      memory.work = work;
      memory.key_origin = row_at<uint16_t>(call.args.key, work.batch, 0, key_head);
      memory.value_origin = row_at<uint16_t>(call.args.value, work.batch, 0, key_head);
    }
    __syncthreads();
    if (has_rows) {
      forward_tile<Element, Shape, kIsBlock>(call, table, memory);
    }
    if (threadIdx.x == 0) {
      memory.item += gridDim.x;
    }
    __syncthreads();
  }
}

}  // namespace dilated::kernels::cuda::portable

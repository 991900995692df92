// A warp's sums of grad_query, 16 rows of a slot, from registers to those in memory (QuerySums):
// through shared memory, block of columns by block, by the copy engine's reductions.
#pragma once

#include "kernels/cuda/hopper/backward_memory.cuh"
#include "kernels/cuda/primitives/warp_tile.cuh"

namespace dilated::kernels::cuda::hopper {

/// Whose rows the sums are.
struct SumTarget {
  int32_t stride;
  SumRows rows;
};

/// All lanes: blocks of rows one by one, where a box would reach beyond its map.
template <typename Shape>
__device__ void add_rows(const BackwardCall& call, const SumRows& to, int64_t stride,
                         uint32_t buffer, int first_column) {
  constexpr int kRowBytes = kBlockColumns * 4, kBlocks = Shape::kSumColumns / kBlockColumns;
  const int64_t head_row = int64_t{to.head} * call.args.queries + to.place;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < to.count * kBlocks; i += 32) {
    const int row = i / kBlocks, block = i % kBlocks;
    const int column = first_column + block * kBlockColumns;
    if (column < call.sums.width) {
      add_bulk(call.sums.row(head_row + stride * row) + column,
               buffer + (block * kSlotRows + kSlotRows - to.count + row) * kRowBytes, kRowBytes);
    }
  }
}

/// All lanes of a warp: adds columns first_column .. of the rows, through the warp's own `buffer`.
template <typename Shape, typename Sums>
__device__ void add_sums(const BackwardCall& call, const SumTarget& target, const Sums& sums,
                         unsigned char* buffer, int first_column) {
  constexpr int kRowBytes = kBlockColumns * 4, kBlockBytes = kSlotRows * kRowBytes;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int block = 0; block < Shape::kSumColumns / kBlockColumns; ++block) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float *low = pair_of(sums, r, 2 * block), *high = pair_of(sums, r, 2 * block + 1);
      *reinterpret_cast<float4*>(buffer + block * kBlockBytes + r * 8 * kRowBytes + lane * 16) = {
          low[0], low[1], high[0], high[1]};
    }
  }
  publish_to_async_proxy();
  __syncwarp();
  const SumRows& to = target.rows;
  const bool has_boxes = first_column + Shape::kSumColumns <= call.sums.width ||
                         call.sums.width % Shape::kBoxColumns == 0;
  if (to.count == kSlotRows && has_boxes) {
    if (lane == 0) {
#pragma unroll
      for (int column = 0; column < Shape::kSumColumns; column += Shape::kBoxColumns) {
        if (column == 0 || first_column + column < call.sums.width) {
          add_box(&call.sum_maps.slot[to.map],
                  shared_address(buffer) + column / kBlockColumns * kBlockBytes,
                  (first_column + column) / kBlockColumns, to.place, to.head);
        }
      }
    }
  } else {
    add_rows<Shape>(call, to, target.stride, shared_address(buffer), first_column);
  }
}

}  // namespace dilated::kernels::cuda::hopper

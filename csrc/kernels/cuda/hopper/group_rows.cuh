// A warpgroup's 64 rows, 16 a warp, from accumulators to a tensor.
#pragma once

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/hopper/wgmma.cuh"
#include "kernels/cuda/primitives/swizzle.cuh"
#include "kernels/cuda/primitives/warp_tile.cuh"
#include "kernels/cuda/primitives/work.cuh"

namespace dilated::kernels::cuda::hopper {

/// Which of the 64 row r of this lane is.
__device__ inline int group_row(int r) {
  return threadIdx.x / 32 % 4 * 16 + r * 8 + threadIdx.x % 32 / 4;
}

/// Where the rows belong.
struct GroupRows {
  const MutableRows& out;
  const WorkItem& work;
  const int32_t* position;  // of each
  int32_t count;            // of those that exist; others are not written
  int64_t head_dim;
};

/// factor * values, as they are.
template <typename Values>
__device__ inline void write_floats(const GroupRows& rows, const Values& values, float factor) {
  const WorkItem& work = rows.work;
  auto* to = row_at<float>(rows.out, work.batch, work.tile.row_shift, work.head);
  for_each_pair(values, [&](const float* pair, int r, int n) {
    const int column = n * 8 + threadIdx.x % 4 * 2;
    if (group_row(r) < rows.count && column < rows.head_dim) {
      *reinterpret_cast<float2*>(to + rows.position[group_row(r)] * rows.out.strides.row +
                                 column) = {pair[0] * factor, pair[1] * factor};
    }
  });
}

/// Four 8 x 8 matrices of 16-bit elements to shared memory; lane l gives the address of row l % 8
/// of matrix l / 8.
__device__ inline void store_matrices(uint32_t row_address, const uint32_t (&matrices)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
      "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
      : "memory");
}

/// Panels of 64 rows in shared memory, each `pitch` bytes after the one before.
struct RowPanels {
  unsigned char* first;
  int pitch;

  __device__ unsigned char* at(int row, int chunk) const {
    return first + chunk / 8 * pitch + Swizzle<8>::offset(row, chunk % 8);
  }
};

/// The same, rounded once, through panels, of which each warp uses its own rows.
template <typename Element, int kUnroll, int kWidth8>
__device__ inline void write_rounded(const GroupRows& rows, const Accumulators<1, kWidth8>& values,
                                     float factor, const RowPanels& panels) {
  const WorkItem& work = rows.work;
  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 % 4 * 16;
  const uint32_t first = shared_address(panels.at(warp_row + lane % 16, lane / 16));
#pragma unroll
  for (int step = 0; step < kWidth8 / 2; ++step) {
    uint32_t packed[1][4];
    pack_left<Element>(packed, values, step, factor);
    store_matrices(Swizzle<8>::advance(first, step % 4) + step / 4 * panels.pitch, packed[0]);
  }
  __syncwarp();
  auto* to = row_at<uint16_t>(rows.out, work.batch, work.tile.row_shift, work.head);
#pragma unroll kUnroll
  for (int i = lane; i < 16 * kWidth8; i += 32) {
    const int row = warp_row + i / kWidth8, chunk = i % kWidth8;
    if (row < rows.count && chunk * 8 < rows.head_dim) {
      *reinterpret_cast<int4*>(to + rows.position[row] * rows.out.strides.row + chunk * 8) =
          *reinterpret_cast<const int4*>(panels.at(row, chunk));
    }
  }
}

}  // namespace dilated::kernels::cuda::hopper

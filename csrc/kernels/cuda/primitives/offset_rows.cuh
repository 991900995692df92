// Copies rows that are listed by byte offset, not by position: rows of several heads can share a
// tile.
#pragma once

#include "kernels/cuda/primitives/row_tile.cuh"

namespace dilated::kernels::cuda {

/// RowTile::copy for rows at source.origin + offsets[0 .. kRows - 1]; source.row_bytes is not used.
/// The caller commits.
template <int kHeadDim, int kRows, int kThreads>
__device__ inline void copy_rows_at(uint32_t tile, const int64_t* offsets,
                                    const RowSource& source) {
  using Tile = RowTile<kHeadDim, kRows, kThreads>;
  using Layout = typename Tile::Layout;
  const int lane = threadIdx.x % Tile::kLanes;
  const int first_row = threadIdx.x / Tile::kLanes;
  if (Tile::kChunks % Tile::kLanes != 0 && lane >= Tile::kChunks) {
    return;
  }
  const uint32_t target = tile + Layout::offset(first_row, lane);
  if (source.is_aligned) {
    const char* origin = source.origin + lane * 16;
#pragma unroll
    for (int row = 0; row < kRows; row += Tile::kRowsAtOnce) {
      const char* from = origin + offsets[first_row + row];
#pragma unroll
      for (int i = 0; i < Tile::kChunksPerLane; ++i) {
        copy_16_async_or_zero(target + row * Layout::kRowBytes + i * Tile::kLanes * 16,
                              from + i * Tile::kLanes * 16,
                              (lane + i * Tile::kLanes) * 8 < source.head_dim);
      }
    }
    return;
  }
#pragma unroll 1
  for (int row = 0; row < kRows; row += Tile::kRowsAtOnce) {
    const auto* from = reinterpret_cast<const uint16_t*>(source.origin + offsets[first_row + row]);
#pragma unroll 1
    for (int chunk = lane; chunk < Tile::kChunks; chunk += Tile::kLanes) {
      const uint32_t to = target + row * Layout::kRowBytes + (chunk - lane) * 16;
      for (int e = 0; e < 8; ++e) {
        const int d = chunk * 8 + e;
        const uint16_t element = d < source.head_dim ? from[d] : 0;
        asm volatile("st.shared.b16 [%0], %1;" ::"r"(to + e * 2), "h"(element) : "memory");
      }
    }
  }
}

}  // namespace dilated::kernels::cuda

// Moves a row between float32 memory and mma accumulators. The four lanes that share a row move 32
// neighbouring bytes at a time, a whole sector.
//
// `row` points to column 0 of the accumulators; memory has `columns` columns from there on.
// is_aligned: `row` is a multiple of 8 bytes and `columns` is even.
#pragma once

#include <cstdint>

namespace dilated::kernels::cuda {

/// Row lane / 4 + 8 * half of the accumulators += factor * row.
template <int kTiles>
__device__ inline void add_row(float (&tiles)[kTiles][4], int half, const float* row,
                               int32_t columns, bool is_aligned, float factor) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int32_t column = n * 8 + threadIdx.x % 4 * 2;
    float2 pair{0, 0};
    if (is_aligned && column < columns) {
      pair = *reinterpret_cast<const float2*>(row + column);
    } else if (!is_aligned) {
      pair = {column < columns ? row[column] : 0, column + 1 < columns ? row[column + 1] : 0};
    }
    tiles[n][half * 2] = fmaf(factor, pair.x, tiles[n][half * 2]);
    tiles[n][half * 2 + 1] = fmaf(factor, pair.y, tiles[n][half * 2 + 1]);
  }
}

/// row = factor * accumulators' row lane / 4 + 8 * half.
template <int kTiles>
__device__ inline void store_row(const float (&tiles)[kTiles][4], int half, float* row,
                                 int32_t columns, bool is_aligned, float factor) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int32_t column = n * 8 + threadIdx.x % 4 * 2;
    const float2 pair{tiles[n][half * 2] * factor, tiles[n][half * 2 + 1] * factor};
    if (is_aligned && column < columns) {
      *reinterpret_cast<float2*>(row + column) = pair;
    } else if (!is_aligned) {
      if (column < columns) {
        row[column] = pair.x;
      }
      if (column + 1 < columns) {
        row[column + 1] = pair.y;
      }
    }
  }
}

}  // namespace dilated::kernels::cuda

// Tiles in a warp's registers, as mma accumulators (mma.cuh), and their products with 16-bit tiles
// in shared memory, which lie as Swizzle says.
//
// Of tiles[kRowTiles][kColumnTiles][4], a lane holds two columns, 8 * n + lane % 4 * 2 and the
// next, of each of 2 * kRowTiles rows: row r is row 8 * r + lane / 4.
#pragma once

#include <cstdint>

#include "kernels/cuda/primitives/mma.cuh"
#include "kernels/cuda/primitives/numerics.cuh"

namespace dilated::kernels::cuda {

template <int kRowTiles, int kColumnTiles>
using Accumulators = float[kRowTiles][kColumnTiles][4];

/// The two columns of row r in column tile n. Float: float or const float.
template <typename Float, int kRowTiles, int kColumnTiles>
__device__ inline Float* pair_of(Float (&tiles)[kRowTiles][kColumnTiles][4], int r, int n) {
  return &tiles[r / 2][n][r % 2 * 2];
}

/// Calls visit(pair_of(tiles, r, n), n) for the pairs of a row.
template <typename Float, int kRowTiles, int kColumnTiles, typename Visit>
__device__ inline void for_each_pair_of_row(Float (&tiles)[kRowTiles][kColumnTiles][4], int r,
                                            const Visit& visit) {
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
    visit(pair_of(tiles, r, n), n);
  }
}

/// Calls visit(pair_of(tiles, r, n), r, n) for all pairs, column tile by column tile.
template <typename Float, int kRowTiles, int kColumnTiles, typename Visit>
__device__ inline void for_each_pair(Float (&tiles)[kRowTiles][kColumnTiles][4],
                                     const Visit& visit) {
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      visit(pair_of(tiles, r, n), r, n);
    }
  }
}

/// What a list of columns, aligned to 8 bytes, has for this lane's two in column tile n.
__device__ inline float2 pair_in(const float* list, int n) {
  return *reinterpret_cast<const float2*>(list + n * 8 + threadIdx.x % 4 * 2);
}
__device__ inline int2 pair_in(const int32_t* list, int n) {
  return *reinterpret_cast<const int2*>(list + n * 8 + threadIdx.x % 4 * 2);
}
__device__ inline uint2 pair_in(const uint32_t* list, int n) {
  return *reinterpret_cast<const uint2*>(list + n * 8 + threadIdx.x % 4 * 2);
}

/// The same for column tiles 2 * step and 2 * step + 1 at once, of a list in which the four columns
/// of a lane lie side by side: column `column` of a tile at quad_place(column).
__device__ inline float4 quad_in(const float* list, int step) {
  return *reinterpret_cast<const float4*>(list + step * 16 + threadIdx.x % 4 * 4);
}
__device__ inline float2 half_of(const float4& quad, int half) {
  return half == 0 ? make_float2(quad.x, quad.y) : make_float2(quad.z, quad.w);
}
__device__ inline int quad_place(int column) {
  return column / 16 * 16 + column % 8 / 2 * 4 + column % 16 / 8 * 2 + column % 2;
}

template <int kRowTiles, int kColumnTiles>
__device__ inline void set_zero(Accumulators<kRowTiles, kColumnTiles>& tiles) {
  for_each_pair(tiles, [](float* pair, int, int) { pair[0] = pair[1] = 0; });
}

template <int kRowTiles, int kColumnTiles>
__device__ inline void scale_row(Accumulators<kRowTiles, kColumnTiles>& tiles, int r,
                                 float factor) {
  for_each_pair_of_row(tiles, r, [&](float* pair, int) {
    pair[0] *= factor;
    pair[1] *= factor;
  });
}

/// Offset of what this lane hands to load_matrices for rows of the left operand, or, transposed, of
/// the right one, from row first_row on.
template <typename Layout>
__device__ inline int left_offset(int first_row, int lane) {
  return Layout::offset(first_row + lane % 16, lane / 16);
}
/// Of the right one, whose rows are the product's columns.
template <typename Layout>
__device__ inline int right_offset(int lane) {
  return Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

/// Columns 16 * step .. of the left operand's rows.
template <typename Layout, int kRowTiles>
__device__ inline void load_left(uint32_t (&a)[kRowTiles][4], uint32_t left, int step) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    load_matrices(a[m], Layout::advance(left, step) + m * 16 * Layout::kRowBytes);
  }
}

/// The same, of factor * accumulators.
template <typename Element, int kRowTiles, int kColumnTiles>
__device__ inline void pack_left(uint32_t (&a)[kRowTiles][4],
                                 const Accumulators<kRowTiles, kColumnTiles>& tiles, int step,
                                 float factor = 1) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = pair_of(tiles, 2 * m + i % 2, 2 * step + i / 2);
      a[m][i] = pack<Element>(pair[0] * factor, pair[1] * factor);
    }
  }
}

/// products[..][n, n + 1] += a b^T.
template <typename Element, int kRowTiles, int kColumnTiles>
__device__ inline void multiply_pair(Accumulators<kRowTiles, kColumnTiles>& products, int n,
                                     const uint32_t (&a)[kRowTiles][4], const uint32_t (&b)[4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    mma_16x8x16<Element>(products[m][n], a[m], b[0], b[1]);
    mma_16x8x16<Element>(products[m][n + 1], a[m], b[2], b[3]);
  }
}

/// products[..][n, n + 1] += a times columns 16 * step .. of rows 8 * n .. at `right`.
template <typename Element, typename Layout, int kRowTiles, int kColumnTiles>
__device__ inline void multiply_rows_step(Accumulators<kRowTiles, kColumnTiles>& products, int n,
                                          const uint32_t (&a)[kRowTiles][4], uint32_t right,
                                          int step) {
  uint32_t b[4];
  load_matrices(b, Layout::advance(right, step) + n * 8 * Layout::kRowBytes);
  multiply_pair<Element>(products, n, a, b);
}

/// products = rows at `left` times rows at `right`, transposed: as Q K^T.
template <typename Element, typename Layout, int kRowTiles, int kColumnTiles>
__device__ inline void multiply_rows(Accumulators<kRowTiles, kColumnTiles>& products, uint32_t left,
                                     uint32_t right) {
  set_zero(products);
#pragma unroll
  for (int step = 0; step < Layout::kRowBytes / 32; ++step) {
    uint32_t a[kRowTiles][4];
    load_left<Layout>(a, left, step);
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      multiply_rows_step<Element, Layout>(products, n, a, right, step);
    }
  }
}

/// sums += a times 16 rows at `rows`, from column 16 * first_pair on.
template <typename Element, typename Layout, int kRowTiles, int kColumnTiles>
__device__ inline void accumulate_step(Accumulators<kRowTiles, kColumnTiles>& sums,
                                       const uint32_t (&a)[kRowTiles][4], uint32_t rows, int step,
                                       int first_pair = 0) {
#pragma unroll
  for (int n = 0; n < kColumnTiles; n += 2) {
    uint32_t b[4];
    load_matrices_transposed(
        b, Layout::advance(rows, first_pair + n / 2) + step * 16 * Layout::kRowBytes);
    multiply_pair<Element>(sums, n, a, b);
  }
}

/// sums += weights times rows at `rows`: as P V.
template <typename Element, typename Layout, int kRowTiles, int kInner, int kColumnTiles>
__device__ inline void accumulate(Accumulators<kRowTiles, kColumnTiles>& sums,
                                  const Accumulators<kRowTiles, kInner>& weights, uint32_t rows) {
#pragma unroll
  for (int step = 0; step < kInner / 2; ++step) {
    uint32_t a[kRowTiles][4];
    pack_left<Element>(a, weights, step);
    accumulate_step<Element, Layout>(sums, a, rows, step);
  }
}

/// Rounds to a tile in shared memory: row r to first_row + 8 * r + lane / 4, columns from 8 *
/// first_chunk on.
template <typename Element, typename Layout, int kRowTiles, int kColumnTiles>
__device__ inline void store_rounded(unsigned char* tile, int first_row, int first_chunk,
                                     const Accumulators<kRowTiles, kColumnTiles>& tiles,
                                     float factor, int lane) {
  for_each_pair(tiles, [&](const float* pair, int r, int n) {
    *reinterpret_cast<uint32_t*>(
        tile + Layout::offset(first_row + r * 8 + lane / 4, first_chunk + n) + lane % 4 * 4) =
        pack<Element>(pair[0] * factor, pair[1] * factor);
  });
}

/// Rows first .. end - 1 of a tile in shared memory to the tensor, kLanes threads a row; thread of
/// kThreads. to(row): where the row's first element lies.
template <typename Layout, int kLanes, int kThreads, typename To>
__device__ inline void write_rows(const unsigned char* tile, int first, int end, int thread,
                                  int32_t head_dim, bool is_aligned, const To& to) {
  for (int row = first + thread / kLanes; row < end; row += kThreads / kLanes) {
    uint16_t* out = to(row);
    for (int chunk = thread % kLanes; chunk * 8 < head_dim; chunk += kLanes) {
      const unsigned char* from = tile + Layout::offset(row, chunk);
      if (is_aligned) {
        *reinterpret_cast<int4*>(out + chunk * 8) = *reinterpret_cast<const int4*>(from);
      } else {
        for (int e = 0; e < 8 && chunk * 8 + e < head_dim; ++e) {
          out[chunk * 8 + e] = reinterpret_cast<const uint16_t*>(from)[e];
        }
      }
    }
  }
}

}  // namespace dilated::kernels::cuda

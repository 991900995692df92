// Tensor maps of rows, which the host encodes for each call.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <climits>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/choose.h"

namespace dilated::kernels::cuda::hopper {

/// Tensor maps of rows, one for each stride: of a whole tile and of a slot. Coordinates are column,
/// step, place, head and batch entry: place + step * stride is the row. Steps below 0 give zeros,
/// from which copies learn where runs begin: a box of n rows at step count - n holds n - count
/// zeros, then `count` rows from `place` on. (Zeros after them would come from rows past the last
/// step; for those the hardware reads at step 0 what it throws away, and the map's start would have
/// to be a row of the tensor.)
///
/// Rows may lie in two tensors: those of the places from near_rows on in the second, whose maps
/// follow those of the first.
struct RowMaps {
  CUtensorMap whole[ListStrides::kMost], slot[ListStrides::kMost];
  int32_t near_rows = INT_MAX;
  int32_t near_maps = 0;
};

/// Tensor maps of float32 sums of rows, of slots alone. Coordinates are a column of a block, step,
/// block of columns, place, and head of all batch entries; so a box holds a block after the other.
/// No box may reach beyond its map.
inline constexpr int32_t kBlockColumns = 16;
struct SumMaps {
  CUtensorMap slot[ListStrides::kMost];
};

/// Whether the driver has what encodes them.
bool can_encode();

/// What maps describe: 16-bit rows, of which a head has `entries`.
struct MappedRows {
  const AttentionArgs& args;
  const Rows& rows;
  int64_t entries, heads;
};

/// Of rows at each stride: boxes of a whole tile of rows and of a slot, with 64 columns, swizzled.
cudaError_t encode_maps(const MappedRows& rows, const ListStrides& strides, int32_t tile_rows,
                        RowMaps& maps);

/// The same of the second tensor's rows, after `near_rows` of the first.
cudaError_t encode_far_maps(const MappedRows& rows, int64_t near_rows, const ListStrides& strides,
                            int32_t tile_rows, RowMaps& maps);

/// Sums, float32 rows [head, entry] of `width` numbers without gaps; heads of all batch entries.
struct MappedSums {
  float* data;
  int64_t width, entries, heads;
};

/// Of sums at each stride: boxes of a slot with `columns` columns.
cudaError_t encode_sum_maps(const MappedSums& sums, const ListStrides& strides, int32_t columns,
                            SumMaps& maps);

}  // namespace dilated::kernels::cuda::hopper

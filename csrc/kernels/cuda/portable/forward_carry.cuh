// Tiles that have no keys in a block: their running result is the result, and is only copied.
//
// In a ring most rows meet no key of most other ranks.
#pragma once

#include "kernels/cuda/primitives/forward_call.cuh"
#include "kernels/cuda/primitives/numerics.cuh"

namespace dilated::kernels::cuda::portable {

__device__ inline bool is_carried(const WorkItem& work, const ForwardArgs& args) {
  return work.group.columns == 0 && work.group.zero_keys == 0 && args.running_lse != nullptr;
}

/// Columns column .. column + 3 of a row of `columns`. is_aligned: as in float_row.cuh, to 16
/// bytes.
__device__ inline float4 load_columns(const float* row, int32_t column, int32_t columns,
                                      bool is_aligned) {
  if (is_aligned) {
    return __ldcs(reinterpret_cast<const float4*>(row + column));
  }
  float four[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    four[e] = column + e < columns ? row[column + e] : 0;
  }
  return {four[0], four[1], four[2], four[3]};
}

template <typename Element>
__device__ inline void store_columns(Element* row, int32_t column, int32_t columns, float4 values,
                                     bool is_aligned) {
  if (is_aligned) {
    if constexpr (sizeof(Element) == 4) {
      *reinterpret_cast<float4*>(row + column) = values;
    } else {
      *reinterpret_cast<uint2*>(row + column) = {pack<Element>(values.x, values.y),
                                                 pack<Element>(values.z, values.w)};
    }
    return;
  }
  const float four[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (column + e < columns) {
      row[column + e] = from_float<Element>(four[e]);
    }
  }
}

/// The whole block; out is of Element. A thread has several pieces under way at once, as they are
/// far.
template <typename Element, int kRows>
__device__ void carry_rows(const ForwardCall& call, const WorkItem& work,
                           const RowTileList<kRows>& tile, int32_t rows) {
  constexpr int kAtOnce = 4, kColumns = 4;
  const ForwardArgs& args = call.args;
  const int32_t columns = static_cast<int32_t>(args.head_dim);
  const int32_t pieces_per_row = (columns + kColumns - 1) / kColumns;
  const int32_t pieces = rows * pieces_per_row;
  const int64_t head_row =
      (work.batch * args.heads + work.head) * args.queries + work.tile.row_shift;
  const float* lse = static_cast<const float*>(args.running_lse) + head_row;
  for (int row = threadIdx.x; row < rows; row += blockDim.x) {
    static_cast<float*>(args.lse)[head_row + tile.position[row]] = lse[tile.position[row]];
  }
  const Rows& running = args.running_out;
  const auto* from = row_at<float>(running, work.batch, work.tile.row_shift, work.head);
  auto* to = row_at<Element>(args.out, work.batch, work.tile.row_shift, work.head);
  for (int first = threadIdx.x; first < pieces; first += blockDim.x * kAtOnce) {
    int64_t position[kAtOnce];
    int32_t column[kAtOnce];
    bool is_read[kAtOnce];
    float4 values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t piece = min(first + i * static_cast<int>(blockDim.x), pieces - 1);
      const int32_t row = piece / pieces_per_row;
      position[i] = tile.position[row];
      column[i] = (piece - row * pieces_per_row) * kColumns;
      is_read[i] = lse[position[i]] != negative_infinity();
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      values[i] = is_read[i] ? load_columns(from + position[i] * running.strides.row, column[i],
                                            columns, running.is_aligned)
                             : float4{0, 0, 0, 0};
    }
    // Past the last piece, threads write that one again, with the same numbers.
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      store_columns(to + position[i] * args.out.strides.row, column[i], columns, values[i],
                    args.out.is_aligned);
    }
  }
}

}  // namespace dilated::kernels::cuda::portable

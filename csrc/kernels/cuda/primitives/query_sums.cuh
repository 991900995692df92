// grad_query as float32 sums that many blocks add to, and the kernel that rounds them in the end.
#pragma once

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/primitives/numerics.cuh"
#include "kernels/cuda/primitives/reduce_add.cuh"

namespace dilated::kernels::cuda {

/// Rows [batch, head, query] of `width` numbers, head_dim rounded up to 16. Within 16 columns,
/// thread t of the four that share a row of an mma accumulator keeps its columns 2t, 2t + 1, 8 +
/// 2t, 9 + 2t side by side, at 4t.
struct QuerySums {
  float* data;
  int32_t width;

  __device__ float* row(int64_t index) const { return data + index * width; }
};

struct ConstQuerySums {
  const float* data;
  int32_t width;
};

/// Two neighbours, rounded to nearest even.
template <typename Element>
__device__ inline void store_pair(Element* to, float low, float high) {
  if constexpr (sizeof(Element) == 4) {
    to[0] = low;
    to[1] = high;
  } else {
    *reinterpret_cast<uint32_t*>(to) = pack<Element>(low, high);
  }
}

/// out = scale * sums, 16 columns a thread, rounded to Element. Rows are counted by [batch, head,
/// query], as the sums lie.
template <typename Element>
__global__ void round_sums_kernel(ConstQuerySums sums, MutableRows out, int64_t heads,
                                  int64_t queries, int64_t rows, int32_t head_dim, float scale) {
  const int32_t blocks = sums.width / 16;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = index / blocks;
  const int32_t column = static_cast<int32_t>(index - row * blocks) * 16;
  if (row >= rows) {
    return;
  }
  const int64_t head_row = row / queries;
  const int64_t batch = head_row / heads;
  Element* to =
      row_at<Element>(out, batch, row - head_row * queries, head_row - batch * heads) + column;
  const float4* from = reinterpret_cast<const float4*>(sums.data + row * sums.width + column);
  alignas(16) Element rounded[16];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const float4 four = from[t];
    store_pair(rounded + 2 * t, four.x * scale, four.y * scale);
    store_pair(rounded + 8 + 2 * t, four.z * scale, four.w * scale);
  }
  constexpr int kPerChunk = 16 / sizeof(Element);
#pragma unroll
  for (int first = 0; first < 16; first += kPerChunk) {
    if (out.is_aligned) {
      if (column + first < head_dim) {
        *reinterpret_cast<uint4*>(to + first) = *reinterpret_cast<const uint4*>(rounded + first);
      }
      continue;
    }
#pragma unroll
    for (int e = first; e < first + kPerChunk; ++e) {
      if (column + e < head_dim) {
        to[e] = rounded[e];
      }
    }
  }
}

}  // namespace dilated::kernels::cuda

// Brings rows from memory into a tile of float32 in shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/primitives/async_copy.cuh"
#include "kernels/cuda/primitives/mma.cuh"
#include "kernels/cuda/primitives/numerics.cuh"

namespace dilated::kernels::cuda::scalar {

/// A block of kThreads threads; row(i): where the tile's row i lies. Zero from head_dim on. Rows of
/// float32 come asynchronously, all at once: wait_for_copies<0>() before the barrier.
template <int kThreads, typename Element, int kRows, int kPitch, typename Row>
__device__ inline void copy_rows(float (&tile)[kRows][kPitch], const Row& row, int32_t head_dim,
                                 bool is_aligned) {
  constexpr bool kIsFloat = std::is_same_v<Element, float>;
  constexpr int kWidth = kPitch - 4;
  if (kIsFloat && is_aligned) {
    constexpr int kLanes = kWidth / 4;  // that share a row
    constexpr int kRowsAtOnce = kThreads / kLanes, kCopies = kRows / kRowsAtOnce;
    static_assert(kRows % kRowsAtOnce == 0);
    const int first = threadIdx.x / kLanes, d = threadIdx.x % kLanes * 4;
    // All of them before the first copy, which waits for every load from shared memory.
    const Element* from[kCopies];
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      from[copy] = row(first + copy * kRowsAtOnce) + d;
    }
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      copy_16_async_or_zero(shared_address(&tile[first + copy * kRowsAtOnce][d]), from[copy],
                            d < head_dim);
    }
  } else {
#pragma unroll 1
    for (int at = threadIdx.x / 32; at < kRows; at += kThreads / 32) {
      const Element* from = row(at);
#pragma unroll
      for (int d = threadIdx.x % 32; d < kWidth; d += 32) {
        if (kIsFloat && d < head_dim) {
          copy_4_async(shared_address(&tile[at][d]), from + d);
        } else {
          tile[at][d] = d < head_dim ? to_float(from[d]) : 0;
        }
      }
    }
  }
  commit_copies();
}

}  // namespace dilated::kernels::cuda::scalar

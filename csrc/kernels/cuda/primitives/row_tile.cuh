// Copies listed rows of a [.., seq_len, .., head_dim] tensor of 16-bit elements into a swizzled
// tile in shared memory.
//
// kLanes neighbouring threads share a row, 16 bytes each at a time. Elements from head_dim to the
// tile's width are zero. Rows that are aligned to 16 bytes are copied asynchronously; others by
// plain loads, element by element.
#pragma once

#include <cstdint>

#include "kernels/cuda/primitives/async_copy.cuh"
#include "kernels/cuda/primitives/swizzle.cuh"

namespace dilated::kernels::cuda {

/// One head of one batch entry of a tensor, addressed by sequence position.
struct RowSource {
  const char* origin;  // where position 0 is, or would be
  uint32_t row_bytes;  // from one position to the next; rows further apart than 4 GiB are refused
                       // by the launcher
  int32_t head_dim;
  bool is_aligned;  // origin and row_bytes are multiples of 16, head_dim of 8
};

template <int kHeadDim, int kRows, int kThreads>
struct RowTile {
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kLanes = kChunks % 8 == 0 || kChunks == 6 ? 8 : 4;
  static constexpr int kChunksPerLane = (kChunks + kLanes - 1) / kLanes;
  static constexpr int kRowsAtOnce = kThreads / kLanes;
  static constexpr int kBytes = kRows * kHeadDim * 2;
  using Layout = Swizzle<kChunks>;
  static_assert(kRowsAtOnce % 8 == 0 && kRows % kRowsAtOnce == 0,
                "a thread's permutation must be the same in all rows");

  /// Rows positions[0 .. kRows - 1], all of which exist. The caller commits the copies.
  __device__ static void copy(uint32_t tile, const int32_t* positions, const RowSource& source) {
    const int lane = threadIdx.x % kLanes;
    const int first_row = threadIdx.x / kLanes;
    if (kChunks % kLanes != 0 && lane >= kChunks) {
      return;
    }
    const uint32_t target = tile + Layout::offset(first_row, lane);
    const char* origin = source.origin + lane * 16;
    if (!source.is_aligned) {
      copy_elements(target, positions + first_row, source, lane);
      return;
    }
#pragma unroll
    for (int row = 0; row < kRows; row += kRowsAtOnce) {
      const char* from =
          origin + static_cast<uint64_t>(static_cast<uint32_t>(positions[first_row + row])) *
                       source.row_bytes;
#pragma unroll
      for (int i = 0; i < kChunksPerLane; ++i) {
        copy_16_async_or_zero(target + row * Layout::kRowBytes + i * kLanes * 16,
                              from + i * kLanes * 16, (lane + i * kLanes) * 8 < source.head_dim);
      }
    }
  }

 private:
  __device__ static void copy_elements(uint32_t target, const int32_t* positions,
                                       const RowSource& source, int lane) {
#pragma unroll 1
    for (int row = 0; row < kRows; row += kRowsAtOnce) {
      const char* from =
          source.origin +
          static_cast<uint64_t>(static_cast<uint32_t>(positions[row])) * source.row_bytes;
#pragma unroll 1
      for (int i = 0; i < kChunksPerLane; ++i) {
        uint32_t words[4];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int d = (lane + i * kLanes) * 8 + e;
          const uint32_t element =
              d < source.head_dim ? reinterpret_cast<const uint16_t*>(from)[d] : 0;
          words[e / 2] = e % 2 == 0 ? element : words[e / 2] | element << 16;
        }
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(
                         target + row * Layout::kRowBytes + i * kLanes * 16),
                     "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                     : "memory");
      }
    }
  }
};

}  // namespace dilated::kernels::cuda

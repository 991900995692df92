// Copies listed rows of a [.., seq_len, .., head_dim] tensor of 16-bit elements into a swizzled
// tile in shared memory. They are listed by row number or, where rows of several heads share a
// tile, by byte offset.
//
// kCopyLanes neighbouring threads share a row, 16 bytes each at a time. Elements from head_dim to
// the tile's width are zero. Rows that are aligned to 16 bytes are copied asynchronously; others by
// plain loads, element by element.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/primitives/async_copy.cuh"
#include "kernels/cuda/primitives/swizzle.cuh"

namespace dilated::kernels::cuda {

/// Where rows lie: of one head of one batch entry, by row number, or anywhere in a tensor, by byte
/// offset.
struct RowSource {
  const char* origin;  // where row 0 is, or would be; by byte offset: the tensor's start
  uint32_t row_bytes;  // from one row to the next; ops::readable() sees that it fits
  int32_t head_dim;
  bool is_aligned;  // as Rows::is_aligned

  __device__ const char* at(int32_t row) const {
    return origin + static_cast<uint64_t>(static_cast<uint32_t>(row)) * row_bytes;
  }
  /// By bytes; row_bytes is not used.
  __device__ const char* at(int64_t offset) const { return origin + offset; }
};

/// Rows of one tensor, then of another.
struct RowSources {
  RowSource near, far;
  int32_t near_rows;
  int32_t head_dim = near.head_dim;
  bool is_aligned = near.is_aligned && far.is_aligned;

  __device__ const char* at(int32_t row) const {
    return row < near_rows ? near.at(row) : far.at(row - near_rows);
  }
};

/// Of 16-bit elements.
__device__ inline RowSource row_source(const void* origin, const Rows& rows, int64_t head_dim) {
  return {static_cast<const char*>(origin), static_cast<uint32_t>(rows.strides.row * 2),
          static_cast<int32_t>(head_dim), rows.is_aligned};
}

template <int kWidth, int kRows, int kThreads>
struct RowTile {
  static constexpr int kChunks = kWidth / 8;
  // For loops that write.
  static constexpr int kLanes = std::min(kChunks % 8 == 0 || kChunks == 6 ? 8 : 4, kThreads / 8);
  // Threads that share a row that is copied. Of eight, six chunks would leave two idle, so there
  // are six, and the first quarter of the block does not copy: kIdle threads.
  static constexpr int kCopyLanes = kChunks == 6 ? 6 : kLanes;
  static constexpr int kIdle = kChunks == 6 ? kThreads / 4 : 0;
  static constexpr int kRowsAtOnce = (kThreads - kIdle) / kCopyLanes;
  static constexpr int kCopies = kRows / kRowsAtOnce;  // rows of a thread
  static constexpr int kBytes = kRows * kWidth * 2;
  using Layout = Swizzle<kChunks>;
  static_assert(kRowsAtOnce % 8 == 0 && kRows % kRowsAtOnce == 0,
                "a thread's permutation must be the same in all rows");
  static_assert(kChunks % kCopyLanes == 0);

  /// Rows rows[0 .. kRows - 1], all of which exist, of each source into its tile. The caller
  /// commits the copies.
  template <typename Row, typename Source, int kTiles>
  __device__ static void copy(const uint32_t (&tiles)[kTiles], const Row* rows,
                              const Source (&sources)[kTiles]) {
    const int thread = static_cast<int>(threadIdx.x) - kIdle;
    if (thread < 0) {
      return;
    }
    const int lane = thread % kCopyLanes, first_row = thread / kCopyLanes;
    // All of them before the first copy, which waits for every load from shared memory.
    Row mine[kCopies];
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      mine[copy] = rows[first_row + copy * kRowsAtOnce];
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const Source& source = sources[tile];
      const uint32_t target = tiles[tile] + Layout::offset(first_row, lane);
      if (source.is_aligned) {
#pragma unroll
        for (int copy = 0; copy < kCopies; ++copy) {
          copy_chunks(target + copy * kRowsAtOnce * Layout::kRowBytes, source.at(mine[copy]), lane,
                      source.head_dim);
        }
      } else {
        // Rows are read again: registers can't be indexed in a loop.
#pragma unroll 1
        for (int copy = 0; copy < kCopies; ++copy) {
          copy_elements(target + copy * kRowsAtOnce * Layout::kRowBytes,
                        source.at(rows[first_row + copy * kRowsAtOnce]), lane, source.head_dim);
        }
      }
    }
  }

 private:
  __device__ static void copy_chunks(uint32_t target, const char* from, int lane,
                                     int32_t head_dim) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += kCopyLanes) {
      copy_16_async_or_zero(Layout::template skip<kCopyLanes>(target, chunk),
                            from + (lane + chunk) * 16, (lane + chunk) * 8 < head_dim);
    }
  }

  __device__ static void copy_elements(uint32_t target, const char* from, int lane,
                                       int32_t head_dim) {
#pragma unroll 1
    for (int chunk = 0; chunk < kChunks; chunk += kCopyLanes) {
      for (int e = 0; e < 8; ++e) {
        const int d = (lane + chunk) * 8 + e;
        const uint16_t element = d < head_dim ? reinterpret_cast<const uint16_t*>(from)[d] : 0;
        asm volatile("st.shared.b16 [%0], %1;" ::"r"(
                         Layout::template skip<kCopyLanes>(target, chunk) + e * 2),
                     "h"(element)
                     : "memory");
      }
    }
  }
};

}  // namespace dilated::kernels::cuda

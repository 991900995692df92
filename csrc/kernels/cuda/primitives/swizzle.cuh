// Where a 16-byte chunk of a tile's row lies in shared memory, so that eight consecutive rows never
// meet in a bank.
//
// Rows are packed without padding, kChunks chunks each. The eight 16-byte bank groups repeat after
// 8 / gcd(kChunks, 8) rows; each later repetition permutes the chunks by an exclusive or below
// gcd(kChunks, 8), which stays within the row:
//
//   kChunks = 8: chunk ^ (row % 8)
//   kChunks = 4: chunk ^ (row / 2 % 4)
//   kChunks = 6: chunk ^ (row / 4 % 2)
#pragma once

#include <cstdint>
#include <numeric>

namespace dilated::kernels::cuda {

template <int kChunks>
struct Swizzle {
  static constexpr int kRepeat = std::gcd(kChunks, 8);  // the permutation's period in chunks
  static constexpr int kRowBytes = kChunks * 16;

  /// What is xor-ed to the chunk's index; depends on row % 8 only.
  __host__ __device__ static constexpr int permutation(int row) {
    return row / (8 / kRepeat) % kRepeat;
  }

  /// Byte offset of the chunk from the tile's start, which is aligned to 128 bytes.
  __host__ __device__ static constexpr int offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ permutation(row)) * 16);
  }

  /// From the address of a chunk below kLanes, a power of two, to that of the chunk `chunks`, a
  /// multiple of kLanes, further.
  template <int kLanes>
  __device__ static uint32_t skip(uint32_t address, int chunks) {
    static_assert(kChunks == kLanes || kRepeat % kLanes == 0);
    return (address ^ static_cast<uint32_t>(chunks % kRepeat * 16)) +
           static_cast<uint32_t>(chunks / kRepeat * kRepeat * 16);
  }

  /// From the address of chunk 0 or 1 of a row to that of the chunk 2 * pair further, as steps of
  /// 16 elements need.
  __device__ static uint32_t advance(uint32_t address, int pair) {
    static_assert(kChunks % 2 == 0);
    constexpr int kPairs = kRepeat / 2;
    return (address ^ static_cast<uint32_t>(pair % kPairs * 32)) +
           static_cast<uint32_t>(pair / kPairs * kRepeat * 16);
  }
};

}  // namespace dilated::kernels::cuda

// The tiles that this family's kernels are compiled for, and their shared memory. The kernels
// assert that it is what their structs take.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/shapes.h"

namespace dilated::kernels::cuda::scalar {

/// Floats from row to row of a tile: reads of 16 bytes from neighbouring rows meet different banks.
constexpr int32_t pitch(int32_t width) { return width + 4; }

struct ForwardTile {
  int32_t width;

  constexpr int32_t rows() const { return width > 128 ? 32 : 64; }
  constexpr int32_t keys() const { return width > 64 ? 32 : 64; }
  constexpr size_t bytes() const {
    const size_t floats = size_t(rows() + keys()) * pitch(width) + rows() * pitch(keys());
    return round_up(4 * floats + key_list_bytes(keys()) + row_list_bytes(rows()) +
                        4 * size_t(rows()) + kCursorBytes,
                    16);
  }
};

inline constexpr ForwardTile kForwardTiles[] = {{64}, {128}, {256}};

struct BackwardTile {
  int32_t width;

  constexpr int32_t rows() const { return width > 128 ? 8 : 32; }
  constexpr size_t bytes() const {
    const size_t floats = 2 * size_t(rows() + kColumns) * pitch(width) + 2 * rows() * kColumns;
    return 4 * floats + key_list_bytes(kColumns) + row_list_bytes(kColumns) + kQueryBytes +
           kCursorBytes;
  }

  static constexpr int32_t kColumns = 32;

 private:
  static constexpr size_t kQueryBytes = 16 * kColumns;  // of queries, and the columns' heads
};

inline constexpr BackwardTile kBackwardTiles[] = {{32}, {64}, {128}, {256}};

}  // namespace dilated::kernels::cuda::scalar

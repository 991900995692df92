// Bytes of what several families keep in shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dilated::kernels::cuda {

constexpr size_t round_up(size_t bytes, size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

constexpr size_t key_list_bytes(int32_t keys) { return 12 * size_t(keys) + 16; }
/// Rows are listed 32 at a time.
constexpr size_t row_list_bytes(int32_t rows) { return 4 * round_up(size_t(rows), 32) + 16; }
inline constexpr size_t kCursorBytes = 64;

}  // namespace dilated::kernels::cuda

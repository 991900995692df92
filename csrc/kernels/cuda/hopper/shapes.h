// The tiles that this family's kernels are compiled for, and their shared memory. The kernels
// assert that it is what their structs take.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/shapes.h"

namespace dilated::kernels::cuda::hopper {

inline constexpr int32_t kSlotRows = 16;  // of keys; see slots.cuh

/// Two warpgroups of query rows.
struct ForwardTile {
  int32_t width;

  constexpr int32_t panels() const { return (width + 63) / 64; }
  constexpr int32_t keys() const { return width > 128 ? 64 : 128; }
  /// Tiles in shared memory. Keys are given back later than values.
  constexpr int32_t key_stages() const { return width <= 64 ? 5 : 3; }
  constexpr int32_t value_stages() const { return width <= 64 ? 5 : 2; }
  /// Whether an item may hold rows of two groups, one for each warpgroup.
  constexpr bool takes_two_groups() const { return width <= 64; }
  constexpr size_t bytes() const {
    const int32_t stages = key_stages() + value_stages();
    const size_t rows = size_t(kRows) * kItems + size_t(keys()) * stages;
    const size_t lists = (kSlotBytes * (keys() / kSlotRows) + 16) * key_stages();
    const size_t barriers = kBarrierBytes * 2 * (2 * kItems + stages);
    return round_up(2 * 64 * panels() * rows + lists + item_bytes() * kItems + 2 * kCursorBytes +
                        barriers,
                    kAlignment) +
           kAlignment;
  }

  static constexpr int32_t kRows = 128, kItems = 2;

 private:
  static constexpr size_t kAlignment = 1024;  // which the start of a block's memory doesn't have
  constexpr size_t item_bytes() const {
    return row_list_bytes(kRows) + 144 + (takes_two_groups() ? 16 : 0);
  }

  static constexpr size_t kSlotBytes = 16, kBarrierBytes = 8;
};

/// Wider ones would take more registers than a thread has.
inline constexpr ForwardTile kForwardTiles[] = {{32}, {48}, {64}, {96}, {128}, {192}};

/// Two warpgroups of key rows.
struct BackwardTile {
  int32_t width;

  constexpr int32_t panels() const { return (width + 63) / 64; }
  constexpr int32_t columns() const { return panels() == 2 ? 64 : 128; }
  constexpr int32_t row_buffers() const { return panels() == 2 ? 1 : 2; }
  /// Of a warpgroup's sums of the queries' gradient, where they have a buffer of their own.
  constexpr int32_t sum_bytes() const { return panels() == 2 ? 4 * 64 * 64 : 0; }
  constexpr size_t bytes() const {
    const size_t rows = 2 * (size_t(kRows) * row_buffers() + size_t(columns()) * kStages);
    const size_t scores = 2 * size_t(kRows) * columns() * kStages;
    const int32_t slots = columns() / kSlotRows;
    const size_t lists = (32 * size_t(slots) + 20 * size_t(columns()) + 16) * kStages +
                         8 * size_t(kRows) * row_buffers();
    const size_t barriers = kBarrierBytes * 2 * (kItems + row_buffers() + 2 * kStages);
    return round_up(2 * 64 * panels() * rows + 2 * size_t(sum_bytes()) + scores + lists +
                        kItemBytes * kItems + 2 * kCursorBytes + barriers,
                    kAlignment) +
           kAlignment;
  }

  static constexpr int32_t kRows = 128, kItems = 2, kStages = 2;

 private:
  static constexpr size_t kAlignment = 1024, kBarrierBytes = 8;
  static constexpr size_t kItemBytes = row_list_bytes(kRows) + 144;
};

inline constexpr BackwardTile kBackwardTiles[] = {{32}, {48}, {64}, {96}, {128}};

}  // namespace dilated::kernels::cuda::hopper

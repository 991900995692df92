// The tiles that this family's kernels are compiled for, and their shared memory. The kernels
// assert that it is what their structs take.
#pragma once

#include <dilated/pattern.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/shapes.h"

namespace dilated::kernels::cuda::portable {

/// A tile of query rows.
struct ForwardTile {
  int32_t width, rows;

  constexpr int32_t keys() const { return width > 128 || rows == kShortRowTile ? 32 : 64; }
  /// Three are enough; four spare a division, where kLeastSharedBytes allow.
  constexpr int32_t lists() const { return width == 128 ? 3 : 4; }
  constexpr size_t bytes() const {
    const size_t tiles = 2 * size_t(width) * (rows + 2 * kStages * keys());
    return round_up(tiles + lists() * key_list_bytes(keys()) + row_list_bytes(rows) + kWork, 128);
  }

  static constexpr int32_t kStages = 2;

 private:
  static constexpr size_t kWork = 176;  // what a block knows of its work item
};

inline constexpr ForwardTile kForwardTiles[] = {{32, 64},  {48, 64},   {64, 64},  {64, 128},
                                                {96, 128}, {128, 128}, {192, 64}, {256, 64}};

/// Of one warp, for patterns of short groups; wider rows take the tiles above.
inline constexpr ForwardTile kShortForwardTiles[] = {
    {32, int32_t{kShortRowTile}}, {64, int32_t{kShortRowTile}}, {128, int32_t{kShortRowTile}}};

/// A tile of keys.
struct BackwardTile {
  int32_t width, keys;

  /// Warps that share the columns of a row.
  constexpr int32_t parts() const { return width <= 64 ? 1 : width <= 128 ? 2 : 4; }
  /// Blocks that are to share a multiprocessor.
  constexpr int32_t blocks() const {
    return keys == kShortRowTile ? 8 / parts() : width <= 64 && keys == 128 ? 2 : 1;
  }
  /// Of a column tile.
  constexpr int32_t queries() const { return keys == kShortRowTile ? 32 : 64; }
  constexpr size_t stage_bytes() const { return 2 * 2 * size_t(width) * queries(); }
  constexpr size_t bytes(int32_t stages) const {
    const size_t weights = 2 * size_t(keys) * queries();
    const size_t tiles = 2 * 2 * size_t(width) * keys + weights + (parts() > 1 ? weights : 128);
    return round_up(tiles + query_lists() + row_list_bytes(keys) + kWork, 128) +
           stages * stage_bytes();
  }

 private:
  constexpr size_t query_lists() const { return 3 * (44 * size_t(queries()) + 16); }

  static constexpr size_t kWork = 164;
};

/// In order of width; of one width, the largest first.
inline constexpr BackwardTile kBackwardTiles[] = {{32, 128}, {48, 128},  {64, 128}, {96, 128},
                                                  {96, 64},  {128, 128}, {128, 64}, {256, 64}};

inline constexpr BackwardTile kShortBackwardTiles[] = {
    {32, int32_t{kShortRowTile}}, {64, int32_t{kShortRowTile}}, {128, int32_t{kShortRowTile}}};

}  // namespace dilated::kernels::cuda::portable

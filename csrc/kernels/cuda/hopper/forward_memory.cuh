// What the warps of a block share, and when each may touch it.
#pragma once

#include <cuda.h>

#include "kernels/cuda/hopper/barrier.cuh"
#include "kernels/cuda/hopper/key_slots.cuh"
#include "kernels/cuda/hopper/shapes.h"
#include "kernels/cuda/hopper/tensor_maps.h"
#include "kernels/cuda/hopper/wgmma.cuh"
#include "kernels/cuda/primitives/forward_call.cuh"

namespace dilated::kernels::cuda::hopper {

struct HopperCall {
  ForwardCall call;
  unsigned long long* counter;  // pairs of tiles taken, but for each block's first; may be null
  KeyStrides strides;
  RowMaps key, value;
};

/// Rows of queries to compute.
template <int kRows, int kGroups>
struct alignas(16) Item {
  RowTileList<kRows> rows;
  WorkItem work;
  Windows windows[kGroups];  // of each warpgroup's rows
  Window seen;               // by some row
  int32_t key_tiles;
  int32_t is_split;  // warpgroups share keys instead of rows
  int32_t is_last;   // there are no more items, and this is none
};

template <int kWidth_>
struct ForwardShape {
  static constexpr int kWidth = kWidth_;
  static constexpr ForwardTile kTile{kWidth};
  static constexpr int kKeys = kTile.keys();
  static constexpr int kKeyStages = kTile.key_stages(), kValueStages = kTile.value_stages();
  static constexpr int kItems = ForwardTile::kItems;
  static constexpr int kSlots = kKeys / kSlotRows;
  static constexpr int kPanels = kTile.panels();
  static constexpr int kGroupRows = 64, kGroups = kMostGroups, kRows = kGroups * kGroupRows;
  using QueryItem = Item<kRows, kGroups>;
  static constexpr int kThreads = 128 * (1 + kGroups);
  static constexpr int kQueryPanelBytes = kGroupRows * kPanelRowBytes;
  static constexpr int kKeyPanelBytes = kKeys * kPanelRowBytes;
};

/// Full: whoever fills it is done; empty: all who read it are.
struct Handover {
  Barrier full, empty;
};

/// Shared memory of a block.
template <typename Shape>
struct ForwardMemory {
  // Each warpgroup's rows apart, panel by panel. Later its output.
  alignas(1024) unsigned char query[Shape::kItems][Shape::kGroups]
                                   [Shape::kPanels * Shape::kQueryPanelBytes];
  alignas(1024) unsigned char key[Shape::kKeyStages][Shape::kPanels * Shape::kKeyPanelBytes];
  alignas(1024) unsigned char value[Shape::kValueStages][Shape::kPanels * Shape::kKeyPanelBytes];
  KeySlots<Shape::kSlots> lists[Shape::kKeyStages];
  typename Shape::QueryItem items[Shape::kItems];
  SlotCursor cursors[2];  // of the warps that copy keys and values
  Handover item_turns[Shape::kItems], query_turns[Shape::kItems], key_turns[Shape::kKeyStages],
      value_turns[Shape::kValueStages];
};

/// Which buffer of `count` is next, and in which round.
struct Turn {
  int count;
  int index = 0;
  uint32_t round = 0;  // modulo 2

  __device__ void advance() {
    if (++index == count) {
      index = 0;
      round ^= 1;
    }
  }
  __device__ uint32_t full_parity() const { return round; }
  __device__ uint32_t empty_parity() const { return round ^ 1; }
};

}  // namespace dilated::kernels::cuda::hopper

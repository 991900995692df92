// What the warps of a block share in the forward pass. Rows are queries, columns keys.
#pragma once

#include <cuda.h>

#include "kernels/cuda/hopper/items.cuh"
#include "kernels/cuda/hopper/shapes.h"
#include "kernels/cuda/hopper/slot_tiles.cuh"
#include "kernels/cuda/primitives/forward_call.cuh"

namespace dilated::kernels::cuda::hopper {

struct HopperCall {
  ForwardCall call;
  unsigned long long* counter;  // pairs of tiles taken, but for each block's first; may be null
  ListStrides strides;
  RowMaps key, value;
};

/// A tile of keys as a warpgroup takes it.
struct Kind {
  static constexpr uint32_t kTaken = 1;
  static constexpr uint32_t kCausal = 2;    // queries see keys up to their own position
  static constexpr uint32_t kWindowed = 4;  // they see those in their windows, or a row has no key
  static constexpr uint32_t kUneven = 8;    // slots differ in bias
  static constexpr uint32_t kFirst = 16;    // that it takes of an item
  uint32_t bits;

  __device__ bool is_passed() const { return (bits & kTaken) == 0; }
  __device__ bool is_plain() const { return bits == kTaken; }
  __device__ bool is_masked() const { return (bits & (kCausal | kWindowed)) != 0; }
  __device__ bool is_windowed() const { return (bits & kWindowed) != 0; }
  __device__ bool is_first() const { return (bits & kFirst) != 0; }
};

struct alignas(16) KeySummary {
  static constexpr int kBits = 8;
  uint32_t kinds;   // Kind::bits for each warpgroup
  float bias_log2;  // of the first slot

  __device__ Kind kind(int group) const { return {kinds >> group * kBits & ((1u << kBits) - 1)}; }
};

template <int kSlots>
struct alignas(16) KeySlots {
  Slot slots[kSlots];
  KeySummary summary;
};

template <int kWidth_>
struct ForwardShape {
  static constexpr int kWidth = kWidth_;
  static constexpr ForwardTile kTile{kWidth};
  static constexpr int kColumns = kTile.keys();
  static constexpr int kKeyStages = kTile.key_stages(), kValueStages = kTile.value_stages();
  static constexpr int kItems = ForwardTile::kItems;
  static constexpr int kSlots = kColumns / kSlotRows;
  static constexpr int kPanels = kTile.panels();
  static constexpr int kGroupRows = 64, kGroups = kMostGroups, kRows = kGroups * kGroupRows;
  static constexpr bool kTakesTwoGroups = kTile.takes_two_groups();
  using RowItem = Item<kRows, kGroups, kTakesTwoGroups>;
  static constexpr int kThreads = 128 * (1 + kGroups);
  static constexpr int kQueryPanelBytes = kGroupRows * kPanelRowBytes;
  static constexpr int kColumnPanelBytes = kColumns * kPanelRowBytes;
};

/// Shared memory of a block.
template <typename Shape>
struct ForwardMemory {
  // Each warpgroup's rows apart, panel by panel. Later its output.
  alignas(1024) unsigned char query[Shape::kItems][Shape::kGroups]
                                   [Shape::kPanels * Shape::kQueryPanelBytes];
  alignas(1024) unsigned char key[Shape::kKeyStages][Shape::kPanels * Shape::kColumnPanelBytes];
  alignas(1024) unsigned char value[Shape::kValueStages][Shape::kPanels * Shape::kColumnPanelBytes];
  KeySlots<Shape::kSlots> lists[Shape::kKeyStages];
  typename Shape::RowItem items[Shape::kItems];
  SlotCursor cursors[2];  // of the warps that copy keys and values
  Handover item_turns[Shape::kItems], query_turns[Shape::kItems], key_turns[Shape::kKeyStages],
      value_turns[Shape::kValueStages];
};

}  // namespace dilated::kernels::cuda::hopper

// What the warps of a block share in the backward pass, and when each may touch it. Rows are keys,
// columns queries.
#pragma once

#include "kernels/cuda/hopper/items.cuh"
#include "kernels/cuda/hopper/shapes.h"
#include "kernels/cuda/hopper/slot_tiles.cuh"
#include "kernels/cuda/hopper/tensor_maps.h"
#include "kernels/cuda/primitives/query_sums.cuh"

namespace dilated::kernels::cuda::hopper {

inline constexpr float kLargestLse = 256;

struct BackwardCall {
  BackwardArgs args;
  unsigned long long* counter;  // pairs of tiles taken, but for each block's first
  int32_t heads_per_key_head;
  float scale_log2;  // scale * log2(e)
  ListStrides strides;
  RowMaps query, grad_out;
  QuerySums sums;
  SumMaps sum_maps;
};

template <int kWidth_>
struct BackwardShape {
  static constexpr int kWidth = kWidth_;
  static constexpr BackwardTile kTile{kWidth};
  static constexpr int kColumns = kTile.columns(), kStages = BackwardTile::kStages;
  static constexpr int kParts = kColumns / kPanelColumns;  // of a tile, one product's columns each
  static constexpr int kItems = BackwardTile::kItems, kRowBuffers = kTile.row_buffers();
  static constexpr int kSlots = kColumns / kSlotRows, kPanels = kTile.panels();
  static constexpr int kThreads = 128 * (1 + kMostGroups);
  static constexpr int kGroupRows = 64, kGroups = kMostGroups, kRows = kGroups * kGroupRows;
  static constexpr int kRowPanelBytes = kGroupRows * kPanelRowBytes;
  static constexpr int kColumnPanelBytes = kColumns * kPanelRowBytes;
  // Of grad_query a warpgroup sums a panel for all queries of the tile, or all for half of them.
  static constexpr int kSumColumns = kPanels == 2 ? kPanelColumns : kWidth;
  static_assert(kParts * kPanels == kGroups);
  static constexpr int kSumBytes = kTile.sum_bytes();
  // A copy adds so many of them, for 16 queries.
  static constexpr int kBoxColumns = kWidth == 96 ? 32 : kSumColumns;
  static constexpr bool kTakesTwoGroups = false;  // columns are summed over all rows of the item
  using RowItem = Item<kRows, kGroups, kTakesTwoGroups>;
};

/// A slot's rows among grad_query's sums: the tensor map of their stride, and where the first is;
/// head of all batch entries.
struct alignas(16) SumRows {
  int32_t map, count, place, head;
};

/// Of a tile of queries and a warpgroup's keys: whether some lse is too large for its rounding not
/// to show, and whether some key does not see some query of a part.
struct TileKind {
  uint32_t bits;

  __device__ bool is_large() const { return (bits & 1) != 0; }
  __device__ bool is_masked(int part) const { return (bits & 2u << part) != 0; }
};

/// What is known of a tile of queries before its rows are there.
template <int kSlots>
struct alignas(16) QuerySlots {
  Slot slots[kSlots];
  SumRows sums[kSlots];
  uint32_t dropout_key[kSlots * kSlotRows];
  float bias[kSlots * kSlotRows];  // log of the multiplicity; -inf where no query is
  float lse[kSlots * kSlotRows];   // as softmax_logit() takes it
  // log2(e) (bias - lse), at quad_place(); 0 if one of the tile's lse is large.
  float offset[kSlots * kSlotRows];
  TileKind kind[kMostGroups];
};

/// Through which sums of grad_query go to memory, where what a warpgroup reads of dS^T is less than
/// they take.
template <int kBytes>
struct SumBuffers {
  alignas(1024) unsigned char sums[kMostGroups][kBytes];
};
template <>
struct SumBuffers<0> {};

template <typename Shape>
struct BackwardMemory : SumBuffers<Shape::kSumBytes> {
  // Each warpgroup's rows apart, panel by panel.
  alignas(1024) unsigned char key[Shape::kRowBuffers][Shape::kGroups]
                                 [Shape::kPanels * Shape::kRowPanelBytes];
  alignas(1024) unsigned char value[Shape::kRowBuffers][Shape::kGroups]
                                   [Shape::kPanels * Shape::kRowPanelBytes];
  alignas(1024) unsigned char query[Shape::kStages][Shape::kPanels * Shape::kColumnPanelBytes];
  alignas(1024) unsigned char grad_out[Shape::kStages][Shape::kPanels * Shape::kColumnPanelBytes];
  // dS^T; in the end grad_key and grad_value.
  alignas(1024) unsigned char scores[Shape::kStages][Shape::kParts][Shape::kRows * kPanelRowBytes];
  QuerySlots<Shape::kSlots> lists[Shape::kStages];
  alignas(16) float delta[Shape::kStages][Shape::kColumns];  // at quad_place()
  Window seen[Shape::kRowBuffers][Shape::kRows];  // by each key; nothing by those that don't exist
  typename Shape::RowItem items[Shape::kItems];
  SlotCursor cursors[2];  // of the warps that copy queries and grad_out
  Handover item_turns[Shape::kItems], row_turns[Shape::kRowBuffers], query_turns[Shape::kStages],
      grad_out_turns[Shape::kStages];
};

}  // namespace dilated::kernels::cuda::hopper

// The first warpgroup: it finds work and brings the rows. Warps 0 and 1 copy keys and values, warp
// 2 lists the next tile of queries, warp 3 copies its rows.
#pragma once

#include "kernels/cuda/hopper/forward_memory.cuh"
#include "kernels/cuda/primitives/async_copy.cuh"
#include "kernels/cuda/primitives/swizzle.cuh"

namespace dilated::kernels::cuda::hopper {

/// Warp 3.
template <typename Shape>
__device__ void copy_queries(const HopperCall& hopper, ForwardMemory<Shape>& memory) {
  constexpr int kChunks = Shape::kWidth / 8;
  const ForwardArgs& args = hopper.call.args;
  for_each_item<Shape>(memory, [&](const typename Shape::RowItem& item, const Turn& items) {
    const WorkItem& work = item.work;
    const RowSource source =
        row_source(row_at<uint16_t>(args.query, work.batch, work.tile.row_shift, work.head),
                   args.query, args.head_dim);
    memory.query_turns[items.index].empty.wait(items.empty_parity());
    const int rows = item.sharing == Sharing::kColumns ? Shape::kGroupRows : Shape::kRows;
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < rows * kChunks; i += 32) {
      const int row = i / kChunks, chunk = i % kChunks;
      unsigned char* group = memory.query[items.index][row / Shape::kGroupRows];
      const uint32_t to = shared_address(group) + chunk / 8 * Shape::kQueryPanelBytes +
                          Swizzle<8>::offset(row % Shape::kGroupRows, chunk % 8);
      copy_16_async_or_zero(to, source.at(item.rows.position[row]) + chunk * 16,
                            chunk * 8 < source.head_dim);
    }
    publish_copies();
    if (threadIdx.x % 32 == 0) {
      memory.query_turns[items.index].full.arrive();
    }
  });
}

/// What the tile is for each warpgroup. taker: as taker_of() says.
template <typename Shape>
__device__ KeySummary summarize(const SlotTile& tile, const typename Shape::RowItem& item,
                                const AttentionArgs& args, int taker) {
  const LaneSlot& slot = tile.slot;
  constexpr uint32_t kSeen = 1, kMasked = 2, kBits = 2;
  uint32_t found = kSeen | kSeen << kBits;
  if (has_windows(item.work, args)) {
    found = 0;
    const int32_t last = slot.first + slot.stride * (slot.count - 1);
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      const Windows& windows = item.windows[group];
      const bool is_seen = last >= windows.some.first && slot.first <= windows.some.last;
      const bool is_masked = !(sees(windows.all, slot.first) && sees(windows.all, last));
      found |= ((is_seen ? kSeen : 0) | (is_masked ? kMasked : 0)) << group * kBits;
    }
    found = __reduce_or_sync(kAllLanes, slot.count > 0 ? found : 0);
  }
  KeySummary summary{.kinds = 0, .bias_log2 = tile.bias_log2};
  const bool is_windowed = !tile.is_full || (item.rows.windows != nullptr &&
                                             (found & (kMasked | kMasked << kBits)) != 0);
#pragma unroll
  for (int group = 0; group < Shape::kGroups; ++group) {
    const uint32_t bits = found >> group * kBits;
    const bool is_taken = taker < 0 ? (bits & kSeen) != 0 : taker == group;
    const uint32_t masked = is_windowed             ? Kind::kWindowed
                            : (bits & kMasked) != 0 ? Kind::kCausal
                                                    : 0;
    const uint32_t kind = is_taken ? Kind::kTaken | masked | (tile.is_even ? 0 : Kind::kUneven) : 0;
    summary.kinds |= kind << group * KeySummary::kBits;
  }
  return summary;
}

template <typename Shape>
__device__ void write_list(const SlotTile& tile, const KeySummary& summary,
                           KeySlots<Shape::kSlots>& list) {
  const int lane = threadIdx.x % 32;
  const LaneSlot& slot = tile.slot;
  const int32_t empty = kSlotRows - slot.count;
  if (lane < Shape::kSlots) {
    list.slots[lane] = {slot.first - slot.stride * empty, slot.stride, empty, tile.bias_log2};
  }
  if (lane == 0) {
    list.summary = summary;
  }
  __syncwarp();
}

/// Warps 0 and 1. Finding a tile's slots takes longer than copying it, so that they take tiles in
/// turn; where there is less room for values than for keys, which would wait for it, one copies
/// keys, the other values.
template <typename Shape>
__device__ void copy_tiles(const HopperCall& hopper, const TableView& table,
                           ForwardMemory<Shape>& memory) {
  constexpr bool kInTurn = Shape::kKeyStages == Shape::kValueStages;
  constexpr int kStep = kInTurn ? 2 : 1;
  const int warp = threadIdx.x / 32;
  const int first_part = kInTurn ? 0 : warp;  // of keys and values
  SlotCursor& cursor = memory.cursors[warp];
  uint32_t next = kInTurn ? warp : 0;  // own tile, of all the block's
  uint32_t begun = 0;                  // the item's first
  for_each_item<Shape>(memory, [&](const typename Shape::RowItem& item, const Turn&) {
    const int32_t head = item.work.head / hopper.call.heads_per_key_head;
    for_each_tile<Shape, kStep>(
        hopper.strides, table, item, cursor, static_cast<int32_t>(next - begun),
        [&](const SlotTile& tile, int taker) {
#pragma unroll 1
          for (int part = first_part; part < first_part + kStep; ++part) {
            const bool is_keys = part == 0;
            const Turn turn =
                is_keys ? turn_at<Shape::kKeyStages>(next) : turn_at<Shape::kValueStages>(next);
            Handover& handover = (is_keys ? memory.key_turns : memory.value_turns)[turn.index];
            KeySummary summary;
            if (is_keys) {
              summary = summarize<Shape>(tile, item, hopper.call.args, taker);
            }
            handover.empty.wait(turn.empty_parity());
            if (is_keys) {
              write_list<Shape>(tile, summary, memory.lists[turn.index]);
            }
            copy_tile<Shape>(tile, is_keys ? hopper.key : hopper.value,
                             is_keys ? memory.key[turn.index] : memory.value[turn.index],
                             handover.full, head, item.work.batch);
          }
          next += kStep;
        });
    begun += count_tiles(item);
  });
}

template <typename Shape>
__device__ void produce(const HopperCall& hopper, const TableView& table,
                        ForwardMemory<Shape>& memory) {
  switch (threadIdx.x / 32) {
    case 0:
    case 1:
      copy_tiles(hopper, table, memory);
      break;
    case 2:
      list_items<Shape>(
          Lister{hopper.call.args, hopper.strides, hopper.counter, table, /*over_keys=*/false},
          memory);
      break;
    default:
      copy_queries(hopper, memory);
  }
}

}  // namespace dilated::kernels::cuda::hopper

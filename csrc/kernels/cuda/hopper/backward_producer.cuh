// The first warpgroup of the backward pass: warp 0 copies queries and lists what their weights
// need, warp 1 copies grad_out, warp 2 lists the next tile of keys, warp 3 copies its rows.
#pragma once

#include "kernels/cuda/hopper/backward_memory.cuh"
#include "kernels/cuda/primitives/async_copy.cuh"
#include "kernels/cuda/primitives/row_tile.cuh"
#include "kernels/cuda/primitives/score.cuh"
#include "kernels/cuda/primitives/swizzle.cuh"
#include "kernels/cuda/primitives/warp_tile.cuh"

namespace dilated::kernels::cuda::hopper {

/// Of the first of the query heads that share the item's KV head.
__device__ inline int64_t first_head_row(const BackwardCall& call, const WorkItem& work) {
  const BackwardArgs& args = call.args;
  return (work.batch * args.heads + int64_t{work.head} * call.heads_per_key_head) * args.queries;
}

/// What this lane knows of its columns of a tile, 32 apart: their lse or delta, and their runs'
/// tags.
template <typename Shape>
struct LaneColumns {
  static constexpr int kColumns = Shape::kColumns / 32;

  float value[kColumns];
  uint32_t tag[kColumns];
};

/// All lanes of a warp, of which each has a slot: from lse or delta, [batch, heads, queries];
/// `absent` where there is no column.
template <typename Shape>
__device__ LaneColumns<Shape> load_columns(const BackwardCall& call, const WorkItem& work,
                                           const SlotTile& tile, const float* values,
                                           float absent) {
  const int lane = threadIdx.x % 32;
  const int64_t head_row = first_head_row(call, work);
  LaneColumns<Shape> columns;
#pragma unroll
  for (int i = 0; i < LaneColumns<Shape>::kColumns; ++i) {
    const int column = i * 32 + lane, owner = column / kSlotRows;
    const int32_t count = __shfl_sync(kAllLanes, tile.slot.count, owner);
    const int32_t stride = __shfl_sync(kAllLanes, tile.slot.stride, owner);
    const int32_t place = __shfl_sync(kAllLanes, tile.place, owner);
    const uint32_t tag = __shfl_sync(kAllLanes, tile.slot.tag, owner);
    const int32_t rank = column % kSlotRows - (kSlotRows - count);
    const int64_t row = head_row + (tag >> 16) * call.args.queries + place + rank * stride;
    columns.value[i] = rank >= 0 ? __ldg(values + row) : absent;
    columns.tag[i] = tag;
  }
  return columns;
}

/// Lists the tile: its slots, and the lse of its queries, that are in `columns`.
template <typename Shape>
__device__ void list_queries(const BackwardCall& call, const typename Shape::RowItem& item,
                             const SlotTile& tile, const LaneColumns<Shape>& columns,
                             QuerySlots<Shape::kSlots>& list) {
  const int lane = threadIdx.x % 32;
  const LaneSlot& slot = tile.slot;
  const int32_t empty = kSlotRows - slot.count;
  if (lane < Shape::kSlots) {
    list.slots[lane] = {slot.first - slot.stride * empty, slot.stride, empty, tile.bias_log2};
    const int32_t head = item.work.head * call.heads_per_key_head + (slot.tag >> 16);
    list.sums[lane] = {slot.map, slot.count, tile.place,
                       static_cast<int32_t>(item.work.batch * call.args.heads) + head};
  }
  constexpr int kLaneColumns = LaneColumns<Shape>::kColumns;
  float lse[kLaneColumns];
  bool is_large = false;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    lse[i] = weight_lse(columns.value[i]);
    is_large = is_large || !(fabsf(lse[i]) <= kLargestLse || lse[i] == -negative_infinity());
  }
  is_large = __any_sync(kAllLanes, is_large);
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const float bias_log2 = log2_approx(static_cast<float>(columns.tag[i] & 0xffu));
    list.bias[i * 32 + lane] = bias_log2 * kLn2;
    list.lse[i * 32 + lane] = lse[i];
    list.offset[i * 32 + quad_place(lane)] = is_large ? 0 : fmaf(lse[i], -kLog2E, bias_log2);
  }
  if (call.args.dropout.probability > 0) {
    __syncwarp();  // slots are written
#pragma unroll 1
    for (int at = lane; at < Shape::kColumns; at += 32) {
      const Slot& owner = list.slots[at / kSlotRows];
      const uint32_t tag = __shfl_sync(kAllLanes, slot.tag, at / kSlotRows);
      list.dropout_key[at] = dropout_row_key(
          __ldg(call.args.dropout.seed), item.work.entry(),
          item.work.head * call.heads_per_key_head + static_cast<int32_t>(tag >> 16),
          owner.first + owner.stride * (at % kSlotRows));
    }
  }
  const int32_t last = slot.first + slot.stride * (slot.count - 1);
#pragma unroll
  for (int group = 0; group < Shape::kGroups; ++group) {
    const Window all = item.windows[group].all;
    const uint32_t masked =
        __ballot_sync(kAllLanes, slot.count > 0 && !(sees(all, slot.first) && sees(all, last)));
    const bool has_all = item.rows.count >= (group + 1) * Shape::kGroupRows;
    constexpr uint32_t kPartSlots = (1u << Shape::kSlots / Shape::kParts) - 1;
    uint32_t bits = is_large ? 1 : 0;
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
      const bool sees_all = (masked >> (part * (Shape::kSlots / Shape::kParts)) & kPartSlots) == 0;
      bits |= has_all && sees_all ? 0 : 2u << part;
    }
    if (lane == 0) {
      list.kind[group] = {bits};
    }
  }
}

/// Warps 0 and 1. What a tile's list takes from memory is on its way before the tile's turn.
template <typename Shape>
__device__ void copy_columns(const BackwardCall& call, const TableView& table,
                             BackwardMemory<Shape>& memory, bool is_query) {
  const int lane = threadIdx.x % 32;
  Handover* turns = is_query ? memory.query_turns : memory.grad_out_turns;
  SlotCursor& cursor = memory.cursors[is_query ? 0 : 1];
  Turn turn{Shape::kStages};
  for_each_item<Shape>(memory, [&](const typename Shape::RowItem& item, const Turn&) {
    const int32_t batch = item.work.batch;
    const int32_t first_head = item.work.head * call.heads_per_key_head;
    for_each_tile<Shape, 1>(call.strides, table, item, cursor, 0, [&](const SlotTile& tile, int) {
      const auto columns =
          is_query
              ? load_columns<Shape>(call, item.work, tile, static_cast<const float*>(call.args.lse),
                                    -negative_infinity())
              : load_columns<Shape>(call, item.work, tile,
                                    static_cast<const float*>(call.args.delta), 0);
      Handover& handover = turns[turn.index];
      handover.empty.wait(turn.empty_parity());
      copy_tile<Shape>(tile, is_query ? call.query : call.grad_out,
                       is_query ? memory.query[turn.index] : memory.grad_out[turn.index],
                       handover.full, first_head + static_cast<int32_t>(tile.slot.tag >> 16),
                       batch);
      if (is_query) {
        list_queries<Shape>(call, item, tile, columns, memory.lists[turn.index]);
      } else {
#pragma unroll
        for (int i = 0; i < LaneColumns<Shape>::kColumns; ++i) {
          memory.delta[turn.index][i * 32 + quad_place(lane)] = columns.value[i];
        }
      }
      __syncwarp();
      if (lane == 0) {
        handover.full.arrive();
      }
      turn.advance();
    });
  });
}

/// Warp 3.
template <typename Shape>
__device__ void copy_rows(const BackwardCall& call, BackwardMemory<Shape>& memory) {
  constexpr int kChunks = Shape::kWidth / 8;
  const BackwardArgs& args = call.args;
  Turn buffers{Shape::kRowBuffers};
  for_each_item<Shape>(memory, [&](const typename Shape::RowItem& item, const Turn&) {
    const WorkItem& work = item.work;
    const auto source_of = [&](const Rows& rows) {
      return row_source(row_at<uint16_t>(rows, work.batch, work.tile.row_shift, work.head), rows,
                        args.head_dim);
    };
    const RowSource key = source_of(args.key), value = source_of(args.value);
    // Copies wait for what was read from shared memory before them, so positions are read first.
    const int lane = threadIdx.x % 32;
    int32_t positions[Shape::kRows / 32];
#pragma unroll
    for (int block = 0; block < Shape::kRows / 32; ++block) {
      positions[block] = item.rows.position[block * 32 + lane];
    }
    memory.row_turns[buffers.index].empty.wait(buffers.empty_parity());
#pragma unroll
    for (int block = 0; block < Shape::kRows / 32; ++block) {
#pragma unroll 4
      for (int i = lane; i < 32 * kChunks; i += 32) {
        const int row = block * 32 + i / kChunks, chunk = i % kChunks;
        const int group = block * 32 / Shape::kGroupRows;
        const int offset = chunk / 8 * Shape::kRowPanelBytes +
                           Swizzle<8>::offset(row % Shape::kGroupRows, chunk % 8);
        const int32_t position = __shfl_sync(kAllLanes, positions[block], i / kChunks);
        const bool exists = chunk * 8 < key.head_dim;
        copy_16_async_or_zero(shared_address(memory.key[buffers.index][group]) + offset,
                              key.at(position) + chunk * 16, exists);
        copy_16_async_or_zero(shared_address(memory.value[buffers.index][group]) + offset,
                              value.at(position) + chunk * 16, exists);
      }
    }
    for (int row = threadIdx.x % 32; row < Shape::kRows; row += 32) {
      const Window window = window_of(item.rows, row, args.is_causal, /*over_keys=*/true);
      memory.seen[buffers.index][row] = row < item.rows.count ? window : Window{INT_MAX, INT_MIN};
    }
    publish_copies();
    if (threadIdx.x % 32 == 0) {
      memory.row_turns[buffers.index].full.arrive();
    }
    buffers.advance();
  });
}

template <typename Shape>
__device__ void produce(const BackwardCall& call, const TableView& table,
                        BackwardMemory<Shape>& memory) {
  switch (threadIdx.x / 32) {
    case 0:
    case 1:
      copy_columns(call, table, memory, /*is_query=*/threadIdx.x < 32);
      break;
    case 2:
      list_items<Shape>(Lister{call.args, call.strides, call.counter, table, /*over_keys=*/true},
                        memory);
      break;
    default:
      copy_rows(call, memory);
  }
}

}  // namespace dilated::kernels::cuda::hopper

// The first warpgroup: it finds work and brings the rows. Warp 0 copies keys and values, warp 1
// lists the next tile of queries, warps 2 and 3 copy its rows.
#pragma once

#include "kernels/cuda/hopper/forward_memory.cuh"
#include "kernels/cuda/primitives/async_copy.cuh"
#include "kernels/cuda/primitives/swizzle.cuh"

namespace dilated::kernels::cuda::hopper {

inline constexpr int kQueryWarps = 2;  // which copy queries

/// How many slots the keys in the window take. All lanes of a warp call it and get the same.
__device__ inline int32_t count_slots(const KeyStrides& strides, const TableView& table,
                                      const WorkItem& work, const Window& window) {
  const Run* runs = table.runs() + work.group.column_runs;
  int32_t slots = 0;
  for (int32_t i = threadIdx.x % 32; i < work.group.column_run_count; i += 32) {
    const ClippedRun run = load_clipped(runs + i, work.tile.origin, window);
    slots += SlotCursor::slots_of(run, find_stride(strides, run.stride));
  }
  return static_cast<int32_t>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(slots)));
}

/// Warp 1: the tile's rows, what they see and how many tiles of keys that takes.
template <typename Shape>
__device__ void list_item(const HopperCall& hopper, const TableView& table, const WorkItem& work,
                          typename Shape::QueryItem& item) {
  const int lane = threadIdx.x % 32;
  const ForwardArgs& args = hopper.call.args;
  __syncwarp();
  if (lane == 0) {
    item.work = work;
    item.rows.windows = own_windows(table, work);
    item.rows.count = min(work.group.rows - work.tile.first_row, Shape::kRows);
    item.is_last = false;
  }
#pragma unroll 1
  for (int first = 0; first < Shape::kRows; first += 32) {
    ColumnCursor cursor = row_cursor_of(table, work);
    Column row[1];
    cursor.read(work.tile.first_row + first, row);
    item.rows.position[first + lane] = row[0].position;
  }
  __syncwarp();
  Windows windows[Shape::kGroups];
  if (has_windows(work, args)) {
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      const int first = group * Shape::kGroupRows + lane;
      const Window rows[2]{window_of(item.rows, first, args.is_causal, /*over_keys=*/false),
                           window_of(item.rows, first + 32, args.is_causal, /*over_keys=*/false)};
      windows[group] = join_windows(rows);
    }
  }
  const Window some{min(windows[0].some.first, windows[1].some.first),
                    max(windows[0].some.last, windows[1].some.last)};
  const int32_t slots = count_slots(hopper.strides, table, work, some);
  if (lane == 0) {
    item.seen[0] = windows[0].some;
    item.seen[1] = windows[1].some;
    item.seen_by_some = some;
    item.seen_by_all = {max(windows[0].all.first, windows[1].all.first),
                        min(windows[0].all.last, windows[1].all.last)};
    item.key_tiles = (slots + Shape::kSlots - 1) / Shape::kSlots;
    item.is_split = item.rows.count <= Shape::kGroupRows;
  }
  __syncwarp();
}

template <typename Shape>
__device__ void list_items(const HopperCall& hopper, const TableView& table,
                           ForwardMemory<Shape>& memory) {
  const int lane = threadIdx.x % 32;
  const int64_t batch = hopper.call.args.batch;
  const int64_t items = count_work(table, batch);
  Turn<Shape::kItems> turn;
  // Two neighbours at a time: of two that are full, the second comes with the first.
#pragma unroll 1
  for (int64_t next = 2 * blockIdx.x;; next += next % 2 == 0 ? 1 : 2 * gridDim.x - 1) {
    const int64_t index = next;
    WorkItem work{};
    if (index < items &&
        !(find_work(table, index, batch, work) && work.tile.first_row % Shape::kRows == 0)) {
      continue;
    }
    Handover& handover = memory.item_turns[turn.index];
    typename Shape::QueryItem& item = memory.items[turn.index];
    handover.empty.wait(turn.empty_parity());
    if (index >= items) {
      item.is_last = true;
      __syncwarp();
      if (lane == 0) {
        handover.full.arrive();
      }
      return;
    }
    list_item<Shape>(hopper, table, work, item);
    if (lane == 0) {
      handover.full.arrive();
    }
    turn.advance();
  }
}

/// Warps 2 and 3.
template <typename Shape>
__device__ void copy_queries(const HopperCall& hopper, ForwardMemory<Shape>& memory) {
  constexpr int kChunks = Shape::kWidth / 8, kThreads = 32 * kQueryWarps;
  const ForwardArgs& args = hopper.call.args;
  const int thread = threadIdx.x % kThreads;
  Turn<Shape::kItems> items;
  Turn<Shape::kQueries> queries;
#pragma unroll 1
  for (;;) {
    memory.item_turns[items.index].full.wait(items.full_parity());
    const typename Shape::QueryItem& item = memory.items[items.index];
    if (item.is_last) {
      return;
    }
    const WorkItem& work = item.work;
    const RowSource source =
        row_source(row_at<uint16_t>(args.query, work.batch, work.tile.row_shift, work.head),
                   args.query, args.head_dim);
    memory.query_turns[queries.index].empty.wait(queries.empty_parity());
    const int rows = item.is_split ? Shape::kGroupRows : Shape::kRows;
#pragma unroll 2
    for (int i = thread; i < rows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      unsigned char* group = memory.query[queries.index][row / Shape::kGroupRows];
      const uint32_t to = shared_address(group) + chunk / 8 * Shape::kQueryPanelBytes +
                          Swizzle<8>::offset(row % Shape::kGroupRows, chunk % 8);
      copy_16_async_or_zero(to, source.at(item.rows.position[row]) + chunk * 16,
                            chunk * 8 < source.head_dim);
    }
    commit_copies();
    wait_for_copies<0>();
    publish_to_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      memory.query_turns[queries.index].full.arrive();
      memory.item_turns[items.index].empty.arrive();
    }
    items.advance();
    queries.advance();
  }
}

/// A lane's box: rows of a whole tile or of a slot.
struct Box {
  const CUtensorMap* map;
  int32_t rows;          // of the map's boxes
  int32_t first_row;     // in the tile
  int32_t place, count;  // its first row, and how many
};

template <typename Shape>
__device__ void copy_panels(const Box& box, unsigned char* tile, Barrier& done, int32_t head,
                            int32_t batch) {
  const uint32_t to = shared_address(tile) + box.first_row * kPanelRowBytes;
#pragma unroll
  for (int panel = 0; panel < Shape::kPanels; ++panel) {
    copy_box(to + panel * Shape::kKeyPanelBytes, box.map, done, panel * kPanelColumns,
             box.count - box.rows, box.place, head, batch);
  }
}

/// Warp 0.
template <typename Shape>
__device__ void copy_keys(const HopperCall& hopper, const TableView& table,
                          ForwardMemory<Shape>& memory) {
  constexpr int kStageBytes = Shape::kPanels * Shape::kKeyPanelBytes;
  const int lane = threadIdx.x % 32;
  Turn<Shape::kItems> items;
  Turn<Shape::kKeyStages> key_turn;
  Turn<Shape::kValueStages> value_turn;
#pragma unroll 1
  for (;;) {
    memory.item_turns[items.index].full.wait(items.full_parity());
    const typename Shape::QueryItem& item = memory.items[items.index];
    if (item.is_last) {
      return;
    }
    const int32_t key_tiles = item.key_tiles, batch = item.work.batch;
    const int32_t head = item.work.head / hopper.call.heads_per_key_head;
    const int32_t* shifts = table.shifts() + item.work.tile.first_stretch;
    const Window all = item.seen_by_all;
    SlotCursor& cursor = memory.cursor;
    if (lane == 0) {
      cursor = {hopper.strides, table.runs() + item.work.group.column_runs,
                item.work.group.column_run_count, item.work.tile.origin, item.seen_by_some};
    }
    __syncwarp();
#pragma unroll 1
    for (int32_t tile = 0; tile < key_tiles; ++tile) {
      LaneSlot slot;
      const bool one_run = cursor.read(tile * Shape::kSlots, Shape::kSlots, slot);
      const bool is_used = lane < Shape::kSlots;
      const int32_t last = slot.first + slot.stride * (slot.count - 1);
      const uint32_t multiplicity = slot.tag & 0xffu;
      const bool is_like_first = multiplicity == __shfl_sync(kAllLanes, multiplicity, 0);
      const bool is_masked = __any_sync(
          kAllLanes, is_used && slot.count > 0 && !(sees(all, slot.first) && sees(all, last)));
      int32_t takers = 1 << tile % Shape::kGroups;
      if (!item.is_split) {
        takers = 0;
#pragma unroll
        for (int group = 0; group < Shape::kGroups; ++group) {
          const Window seen = item.seen[group];
          const bool is_seen =
              is_used && slot.count > 0 && last >= seen.first && slot.first <= seen.last;
          takers |= __any_sync(kAllLanes, is_seen) ? 1 << group : 0;
        }
      }
      const bool is_full =
          __all_sync(kAllLanes, !is_used || (is_like_first && slot.count == kSlotRows));
      const int32_t rows = static_cast<int32_t>(
          __reduce_add_sync(kAllLanes, static_cast<unsigned>(is_used ? slot.count : 0)));
      const bool is_whole =
          one_run && rows == Shape::kKeys && __shfl_sync(kAllLanes, slot.map, 0) >= 0;
      const int32_t map = max(slot.map, 0), empty = kSlotRows - slot.count;
      const int32_t place =
          slot.count == 0 ? 0 : slot.first + __ldg(shifts + Column::stretch(slot.tag));
      KeySlots<Shape::kSlots>& list = memory.lists[key_turn.index];
      Handover& keys = memory.key_turns[key_turn.index];
      Handover& values = memory.value_turns[value_turn.index];
      keys.empty.wait(key_turn.empty_parity());
      if (is_used) {
        list.slots[lane] = {slot.first - slot.stride * empty, slot.stride, empty,
                            log2_approx(static_cast<float>(multiplicity))};
      }
      if (lane == 0) {
        list.is_plain = is_full && !is_masked;
        list.is_masked = is_masked;
        list.takers = takers;
      }
      __syncwarp();
      const auto copy = [&](const KeyMaps& maps, unsigned char* to, Barrier& done) {
        if (lane == 0) {
          done.arrive_expecting(kStageBytes);
        }
        __syncwarp();
        if (is_whole) {
          if (lane == 0) {
            copy_panels<Shape>({&maps.whole[map], Shape::kKeys, 0, place, rows}, to, done, head,
                               batch);
          }
        } else if (is_used) {
          copy_panels<Shape>({&maps.slot[map], kSlotRows, lane * kSlotRows, place, slot.count}, to,
                             done, head, batch);
        }
      };
      copy(hopper.key, memory.key[key_turn.index], keys.full);
      values.empty.wait(value_turn.empty_parity());
      copy(hopper.value, memory.value[value_turn.index], values.full);
      key_turn.advance();
      value_turn.advance();
    }
    __syncwarp();
    if (lane == 0) {
      memory.item_turns[items.index].empty.arrive();
    }
    items.advance();
  }
}

template <typename Shape>
__device__ void produce(const HopperCall& hopper, const TableView& table,
                        ForwardMemory<Shape>& memory) {
  switch (threadIdx.x / 32) {
    case 0:
      copy_keys(hopper, table, memory);
      break;
    case 1:
      list_items(hopper, table, memory);
      break;
    default:
      copy_queries(hopper, memory);
  }
}

}  // namespace dilated::kernels::cuda::hopper

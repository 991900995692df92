// The first warpgroup: it finds work and brings the rows. Warp 0 copies keys, warp 1 values, warp 2
// lists the next tile of queries, warp 3 copies its rows.
#pragma once

#include "kernels/cuda/hopper/forward_memory.cuh"
#include "kernels/cuda/primitives/async_copy.cuh"
#include "kernels/cuda/primitives/swizzle.cuh"

namespace dilated::kernels::cuda::hopper {

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

/// What lists items.
struct Lister {
  const AttentionArgs& args;
  const KeyStrides& strides;
  unsigned long long* counter;
  TableView table;
  bool over_keys;  // rows are keys
};

/// Warp 2: the tile's rows, what they see and how many tiles of keys that takes.
template <typename Shape>
__device__ void list_item(const Lister& lister, const WorkItem& work,
                          typename Shape::QueryItem& item) {
  const int lane = threadIdx.x % 32;
  const auto& [args, strides, counter, table, over_keys] = lister;
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
  const bool is_split = work.group.rows - work.tile.first_row <= Shape::kGroupRows;
  Windows windows[Shape::kGroups];
  if (has_windows(work, args)) {
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
      const int first = (is_split ? 0 : group * Shape::kGroupRows) + lane;
      const Window rows[2]{window_of(item.rows, first, args.is_causal, over_keys),
                           window_of(item.rows, first + 32, args.is_causal, over_keys)};
      windows[group] = join_windows(rows);
    }
  }
  const Window seen{min(windows[0].some.first, windows[1].some.first),
                    max(windows[0].some.last, windows[1].some.last)};
  const int32_t slots = count_slots(strides, table, work, seen);
  if (lane == 0) {
    item.windows[0] = windows[0];
    item.windows[1] = windows[1];
    item.seen = seen;
    item.key_tiles = (slots + Shape::kSlots - 1) / Shape::kSlots;
    item.is_split = is_split;
  }
  __syncwarp();
}

/// The pair of tiles after `pair`. Lane 0 knows it, later than the others go on.
__device__ inline int64_t find_next_pair(unsigned long long* counter, int64_t pair) {
  if (counter == nullptr) {
    return pair + gridDim.x;
  }
  return threadIdx.x % 32 != 0 ? 0 : gridDim.x + static_cast<int64_t>(atomicAdd(counter, 1));
}

/// Blocks take pairs of tiles, of which the second one mostly comes with the first.
template <typename Shape, typename Memory>
__device__ void list_items(const Lister& lister, Memory& memory) {
  const TableView& table = lister.table;
  const int64_t batch = lister.args.batch;
  const int64_t tiles = count_work(table, batch);
  Turn turn{Shape::kItems};
  const auto fill = [&](const auto& write) {
    Handover& handover = memory.item_turns[turn.index];
    handover.empty.wait(turn.empty_parity());
    write(memory.items[turn.index]);
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      handover.full.arrive();
    }
    turn.advance();
  };
#pragma unroll 1
  for (int64_t pair = blockIdx.x; 2 * pair < tiles;) {
    const int64_t next = find_next_pair(lister.counter, pair);
#pragma unroll 1
    for (int64_t tile = 2 * pair; tile < min(2 * pair + 2, tiles); ++tile) {
      WorkItem work;
      if (find_work(table, tile, batch, work) && work.tile.first_row % Shape::kRows == 0) {
        fill([&](typename Shape::QueryItem& item) { list_item<Shape>(lister, work, item); });
      }
    }
    pair = __shfl_sync(kAllLanes, next, 0);
  }
  fill([&](typename Shape::QueryItem& item) { item.is_last = true; });
}

/// Warp 3.
template <typename Shape>
__device__ void copy_queries(const HopperCall& hopper, ForwardMemory<Shape>& memory) {
  constexpr int kChunks = Shape::kWidth / 8;
  const ForwardArgs& args = hopper.call.args;
  Turn items{Shape::kItems};
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
    memory.query_turns[items.index].empty.wait(items.empty_parity());
    const int rows = item.is_split ? Shape::kGroupRows : Shape::kRows;
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < rows * kChunks; i += 32) {
      const int row = i / kChunks, chunk = i % kChunks;
      unsigned char* group = memory.query[items.index][row / Shape::kGroupRows];
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
      memory.query_turns[items.index].full.arrive();
      memory.item_turns[items.index].empty.arrive();
    }
    items.advance();
  }
}

/// A tile of keys, of which each lane holds a slot. Uniform but for that.
struct SlotTile {
  LaneSlot slot;
  int32_t place;   // of the slot's first row
  bool is_full;    // each slot has all its rows
  bool is_even;    // and the same bias
  bool is_mapped;  // one box of rows is the whole tile
  float bias_log2;
};

/// Tiles from the list's slot `first` on, all lanes of which differ only in their rows' positions,
/// by the same number: returns how many.
template <typename Shape>
__device__ int32_t read_tiles(const KeyStrides& strides, SlotCursor& cursor, int32_t first,
                              const int32_t* shifts, SlotTile& tile) {
  const int lane = threadIdx.x % 32;
  LaneSlot& slot = tile.slot;
  const bool one_run = cursor.read(strides, first, Shape::kSlots, slot);
  if (lane >= Shape::kSlots) {
    slot.count = 0;
  }
  const uint32_t multiplicity = slot.tag & 0xffu;
  const bool is_like_first = multiplicity == __shfl_sync(kAllLanes, multiplicity, 0);
  const bool is_unused = lane >= Shape::kSlots;
  tile.is_full = __all_sync(kAllLanes, is_unused || slot.count == kSlotRows);
  tile.is_even = __all_sync(kAllLanes, is_unused || (slot.count == kSlotRows && is_like_first));
  tile.is_mapped = one_run && tile.is_full && __shfl_sync(kAllLanes, slot.map, 0) >= 0;
  tile.bias_log2 = log2_approx(static_cast<float>(multiplicity));
  tile.place = slot.count == 0 ? 0 : slot.first + __ldg(shifts + Column::stretch(slot.tag));
  return tile.is_mapped ? cursor.count_tiles(first, Shape::kSlots) : 1;
}

/// What the tile is for each warpgroup.
template <typename Shape>
__device__ KeySummary summarize(const SlotTile& tile, const typename Shape::QueryItem& item,
                                const AttentionArgs& args, int32_t index) {
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
  KeySummary summary{.kind = {}, .bias_log2 = tile.bias_log2, .reserved = 0};
  const bool is_causal = item.rows.windows == nullptr && args.scale > 0;
  const Kind masked = tile.is_even && is_causal ? Kind::kCausal : Kind::kMasked;
  const Kind seen = tile.is_even ? Kind::kPlain : Kind::kSlots;
#pragma unroll
  for (int group = 0; group < Shape::kGroups; ++group) {
    const uint32_t bits = found >> group * kBits;
    const bool is_taken = item.is_split ? index % Shape::kGroups == group : (bits & kSeen) != 0;
    summary.kind[group] = !is_taken ? Kind::kPassed : (bits & kMasked) != 0 ? masked : seen;
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

/// A box of a map: zeros, then `count` rows from `place` on.
struct Box {
  const CUtensorMap* map;
  int32_t rows, count, place;
};

template <typename Shape>
__device__ void copy_panels(const Box& box, uint32_t to, Barrier& done, int32_t head,
                            int32_t batch) {
#pragma unroll
  for (int panel = 0; panel < Shape::kPanels; ++panel) {
    copy_box(to + panel * Shape::kKeyPanelBytes, box.map, done, panel * kPanelColumns,
             box.count - box.rows, box.place, head, batch);
  }
}

/// The tile's rows of the keys or of the values.
template <typename Shape>
__device__ void copy_tile(const SlotTile& tile, const RowMaps& maps, unsigned char* to,
                          Barrier& done, int32_t head, int32_t batch) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) {
    done.arrive_expecting(Shape::kPanels * Shape::kKeyPanelBytes);
  }
  const uint32_t address = shared_address(to);
  if (tile.is_mapped) {
    if (lane == 0) {
      copy_panels<Shape>({&maps.whole[tile.slot.map], Shape::kKeys, Shape::kKeys, tile.place},
                         address, done, head, batch);
    }
    return;
  }
  __syncwarp();
  if (lane < Shape::kSlots) {
    copy_panels<Shape>({&maps.slot[max(tile.slot.map, 0)], kSlotRows, tile.slot.count, tile.place},
                       address + lane * kSlotRows * kPanelRowBytes, done, head, batch);
  }
}

/// Warps 0 and 1. The one that copies keys also lists them.
template <typename Shape>
__device__ void copy_tiles(const HopperCall& hopper, const TableView& table,
                           ForwardMemory<Shape>& memory, bool is_keys) {
  const int lane = threadIdx.x % 32;
  Handover* turns = is_keys ? memory.key_turns : memory.value_turns;
  SlotCursor& cursor = memory.cursors[is_keys ? 0 : 1];
  Turn items{Shape::kItems};
  Turn turn{is_keys ? Shape::kKeyStages : Shape::kValueStages};
#pragma unroll 1
  for (;;) {
    memory.item_turns[items.index].full.wait(items.full_parity());
    const typename Shape::QueryItem& item = memory.items[items.index];
    if (item.is_last) {
      return;
    }
    const int32_t batch = item.work.batch;
    const int32_t head = item.work.head / hopper.call.heads_per_key_head;
    if (lane == 0) {
      cursor = {table.runs() + item.work.group.column_runs, item.work.group.column_run_count,
                item.work.tile.origin, item.seen};
    }
    __syncwarp();
    int32_t alike = 0;
    SlotTile tile;
#pragma unroll 1
    for (int32_t index = 0; index < item.key_tiles; ++index) {
      if (alike == 0) {
        const int32_t* shifts = table.shifts() + item.work.tile.first_stretch;
        alike = read_tiles<Shape>(hopper.strides, cursor, index * Shape::kSlots, shifts, tile);
      }
      Handover& handover = turns[turn.index];
      if (is_keys) {
        const KeySummary summary = summarize<Shape>(tile, item, hopper.call.args, index);
        handover.empty.wait(turn.empty_parity());
        write_list<Shape>(tile, summary, memory.lists[turn.index]);
      } else {
        handover.empty.wait(turn.empty_parity());
      }
      copy_tile<Shape>(tile, is_keys ? hopper.key : hopper.value,
                       is_keys ? memory.key[turn.index] : memory.value[turn.index], handover.full,
                       head, batch);
      turn.advance();
      if (--alike > 0) {
        tile.slot.first += Shape::kKeys * tile.slot.stride;
        tile.place += Shape::kKeys * tile.slot.stride;
      }
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
    case 1:
      copy_tiles(hopper, table, memory, /*is_keys=*/threadIdx.x < 32);
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

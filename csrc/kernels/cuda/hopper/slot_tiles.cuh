// Tiles of columns on their way: from a list to tensor maps' boxes.
#pragma once

#include "kernels/cuda/hopper/items.cuh"
#include "kernels/cuda/hopper/slots.cuh"
#include "kernels/cuda/hopper/tensor_maps.h"
#include "kernels/cuda/hopper/wgmma.cuh"

namespace dilated::kernels::cuda::hopper {

/// A tile of columns, of which each lane holds a slot. Uniform but for that.
struct SlotTile {
  LaneSlot slot;
  int32_t place;   // of the slot's first row
  bool is_full;    // each slot has all its rows
  bool is_even;    // slots that have rows have the same bias
  bool is_mapped;  // one box of rows is the whole tile
  float bias_log2;
};

/// Tiles from the list's slot `first` on, all lanes of which differ only in their rows' positions,
/// by the same number: returns how many.
template <typename Shape>
__device__ int32_t read_tiles(const ListStrides& strides, SlotCursor& cursor, int32_t first,
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
  tile.is_even = __all_sync(kAllLanes, is_unused || slot.count == 0 || is_like_first);
  tile.is_mapped = one_run && tile.is_full && __shfl_sync(kAllLanes, slot.map, 0) >= 0;
  tile.bias_log2 = log2_approx(static_cast<float>(multiplicity));
  tile.place = slot.count == 0 ? 0 : slot.first + __ldg(shifts + Column::stretch(slot.tag));
  return tile.is_mapped ? cursor.count_tiles(first, Shape::kSlots) : 1;
}

/// Which warpgroup takes the item's tile of columns `index`; -1: all that see it.
template <typename Item>
__device__ int taker_of(const Item& item, Sharing sharing, int32_t index) {
  if (sharing == Sharing::kRows) {
    return -1;
  }
  if constexpr (Item::kTakesTwoGroups) {
    const ColumnList(&columns)[2] = item.columns;
    if (sharing == Sharing::kNothing && index >= 2 * min(columns[0].tiles, columns[1].tiles)) {
      return static_cast<int>(columns[1].tiles > columns[0].tiles);
    }
  }
  return index % 2;  // while both have tiles
}

/// Of the tiles before `index`, how many are of its list.
template <typename Item>
__device__ int32_t tiles_before(const Item& item, int list, int32_t index) {
  if constexpr (Item::kTakesTwoGroups) {
    if (item.sharing == Sharing::kNothing) {
      return max(index / 2, index - item.columns[1 - list].tiles);
    }
  }
  return index;
}

/// One warp, whose cursor it is: visit(tile, taker_of() it) for the item's tiles of columns first,
/// first + kStep, ...
template <typename Shape, int kStep, typename Visit>
__device__ void for_each_tile(const ListStrides& strides, const TableView& table,
                              const typename Shape::RowItem& item, SlotCursor& cursor,
                              int32_t first, const Visit& visit) {
  const Sharing sharing = item.sharing;
  const bool has_two = Shape::kTakesTwoGroups && sharing == Sharing::kNothing;
  int read_list = -1;
  int32_t alike = 0;
  SlotTile tile;
#pragma unroll 1
  for (int32_t index = first; index < count_tiles(item); index += kStep) {
    const int taker = taker_of(item, sharing, index);
    const int list = has_two ? taker : 0;
    if (has_two ? list != read_list : index == first) {
      read_list = list;
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
        const ColumnList& columns = item.columns[list];
        cursor = {table.runs() + columns.runs, columns.run_count, columns.origin, columns.seen};
      }
      __syncwarp();
    }
    if (alike > kStep && !has_two) {
      alike -= kStep;
      tile.slot.first += kStep * Shape::kColumns * tile.slot.stride;
      tile.place += kStep * Shape::kColumns * tile.slot.stride;
    } else {
      const int32_t* shifts = table.shifts() + item.work.tile.first_stretch;
      const int32_t before = has_two ? tiles_before(item, list, index) : index;
      alike = read_tiles<Shape>(strides, cursor, before * Shape::kSlots, shifts, tile);
    }
    visit(tile, taker);
  }
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
    copy_box(to + panel * Shape::kColumnPanelBytes, box.map, done, panel * kPanelColumns,
             box.count - box.rows, box.place, head, batch);
  }
}

/// All lanes of a warp: the tile's rows of `head`, which a lane gives for its slot.
template <typename Shape>
__device__ void copy_tile(const SlotTile& tile, const RowMaps& maps, unsigned char* to,
                          Barrier& done, int32_t head, int32_t batch) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) {
    done.arrive_expecting(Shape::kPanels * Shape::kColumnPanelBytes);
  }
  const uint32_t address = shared_address(to);
  const bool is_far = tile.place >= maps.near_rows;
  const int32_t map = max(tile.slot.map, 0) + (is_far ? maps.near_maps : 0);
  const int32_t place = tile.place - (is_far ? maps.near_rows : 0);
  if (tile.is_mapped) {
    if (lane == 0) {
      copy_panels<Shape>({&maps.whole[map], Shape::kColumns, Shape::kColumns, place}, address, done,
                         head, batch);
    }
    return;
  }
  __syncwarp();
  if (lane < Shape::kSlots) {
    copy_panels<Shape>({&maps.slot[map], kSlotRows, tile.slot.count, place},
                       address + lane * kSlotRows * kPanelRowBytes, done, head, batch);
  }
}

}  // namespace dilated::kernels::cuda::hopper

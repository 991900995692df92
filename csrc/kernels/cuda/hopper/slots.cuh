// A tile of columns in slots of kSlotRows rows: what tensor maps can copy. A slot holds rows of one
// run, each its stride after the one before; where they are too few, zeros come before them.
//
// Runs are cut into slots in order; as slots don't share runs, a run wastes at most kSlotRows - 1
// columns. One warp reads the list, as ColumnCursor does, with slots in place of columns.
#pragma once

#include <dilated/pattern_layout.h>

#include <climits>
#include <cstdint>

#include "kernels/cuda/choose.h"
#include "kernels/cuda/hopper/shapes.h"
#include "kernels/cuda/primitives/columns.cuh"

namespace dilated::kernels::cuda::hopper {

struct alignas(16) Slot {
  int32_t first;  // position of its first row, were it not empty
  int32_t stride;
  int32_t empty;  // rows before its first one; kSlotRows past the end of the list
  float bias_log2;

  /// A position that no row sees where the slot is empty.
  __device__ int32_t position(int row) const {
    return row < empty ? INT_MAX : first + stride * row;
  }
};

/// Which of the strides, that have tensor maps, this is; -1: none.
__device__ inline int32_t find_stride(const ListStrides& strides, int32_t wanted) {
  int32_t found = -1;
#pragma unroll 1
  for (int32_t i = 0; i < strides.count; ++i) {
    found = strides.stride[i] == wanted ? i : found;
  }
  return found;
}

/// What the window leaves of a run, in slots: the last one is filled with positions behind the
/// window, which rows mask. Without a map, rows are copied one by one.
__device__ inline ClippedRun load_slots(const ListStrides& strides, const Run* run, int32_t origin,
                                        const Window& window, int32_t& map) {
  ClippedRun seen = load_clipped(run, origin, window);
  map = find_stride(strides, seen.stride);
  if (map >= 0 && window.last < INT_MAX) {
    const ClippedRun rest = load_clipped(run, origin, {window.first, INT_MAX});
    seen.count = min(rest.count, (seen.count + kSlotRows - 1) / kSlotRows * kSlotRows);
  }
  return seen;
}

/// What a lane knows of its slot.
struct LaneSlot {
  int32_t first, stride, count;
  int32_t map;  // of its stride; -1: there is none, and at most one row
  uint32_t tag;
};

/// Reads a list from front to back. In shared memory, as all lanes of a warp read together.
class SlotCursor {
 public:
  __device__ SlotCursor(const Run* runs, int32_t run_count, int32_t origin, const Window& window)
      : runs_(runs), run_count_(run_count), origin_(origin), window_(window) {}

  /// All lanes: lane i gets slot first + i. `first` must not fall from call to call. True if lanes
  /// 0 .. wanted - 1 all got slots of one run.
  __device__ bool read(const ListStrides& strides, int32_t first, int32_t wanted, LaneSlot& slot) {
    const int32_t lane = threadIdx.x % 32;
    if (first < begin_ || first + wanted > begin_ + slots_of(current_, map_)) {
      return search(strides, first, wanted, slot);
    }
    slot = slot_at(current_, map_, first - begin_ + lane);
    return true;
  }

  /// How many tiles of `slots` slots, all full, the run has from slot `first` on, which read() has
  /// found in it.
  __device__ int32_t count_tiles(int32_t first, int32_t slots) const {
    return (current_.count - (first - begin_) * kSlotRows) / (slots * kSlotRows);
  }

  __device__ static int32_t slots_of(const ClippedRun& run, int32_t map) {
    return map < 0 ? run.count : (run.count + kSlotRows - 1) / kSlotRows;
  }

 private:
  __device__ static LaneSlot slot_at(const ClippedRun& run, int32_t map, int32_t index) {
    const int32_t rows = map < 0 ? 1 : kSlotRows;
    const int32_t before = index * rows;
    return {run.first + run.stride * before, run.stride, max(0, min(run.count - before, rows)), map,
            run.tag};
  }

  __device__ bool search(const ListStrides& strides, int32_t first, int32_t wanted, LaneSlot& slot);

  const Run* runs_;
  int32_t run_count_, origin_;
  Window window_;
  int32_t index_ = 0;  // run that current_ was read from
  int32_t begin_ = 0;  // slots before it
  ClippedRun current_{0, 1, 0, 0};
  int32_t map_ = 0;
};

__device__ inline bool SlotCursor::search(const ListStrides& strides, int32_t first, int32_t wanted,
                                          LaneSlot& slot) {
  const int32_t lane = threadIdx.x % 32;
  slot = {0, 1, 0, 0, 0};
  int32_t owners = 0;
  for (int32_t base = index_, before = begin_; base < run_count_; base += 32) {
    ClippedRun run{0, 1, 0, 0};
    int32_t map = -1;
    if (base + lane < run_count_) {
      run = load_slots(strides, runs_ + base + lane, origin_, window_, map);
    }
    const int32_t slots = slots_of(run, map);
    int32_t end = slots;  // becomes where the run ends, in slots
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int32_t below = __shfl_up_sync(kAllLanes, end, delta);
      end += lane >= delta ? below : 0;
    }
    end += before;
    int32_t owner = 0;  // first run that ends after the lane's slot
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      owner += __shfl_sync(kAllLanes, end, owner + step - 1) <= first + lane ? step : 0;
    }
    const ClippedRun found{
        __shfl_sync(kAllLanes, run.first, owner), __shfl_sync(kAllLanes, run.stride, owner),
        __shfl_sync(kAllLanes, run.count, owner), __shfl_sync(kAllLanes, run.tag, owner)};
    const int32_t found_map = __shfl_sync(kAllLanes, map, owner);
    const int32_t found_begin = __shfl_sync(kAllLanes, end - slots, owner);
    const int32_t batch_end = __shfl_sync(kAllLanes, end, 31);
    const int32_t wanted_slot = first + lane;
    if (wanted_slot >= before && wanted_slot < batch_end) {
      slot = slot_at(found, found_map, wanted_slot - found_begin);
    }
    owners +=
        __popc(__ballot_sync(kAllLanes, slots > 0 && end > first && end - slots < first + wanted));
    // The next tile begins in, or after, the run that holds this tile's last slot.
    const uint32_t reaching = __ballot_sync(kAllLanes, end >= first + wanted && slots > 0);
    if (reaching != 0) {
      const int32_t last = __ffs(reaching) - 1;
      const int32_t last_begin = __shfl_sync(kAllLanes, end - slots, last);
      __syncwarp();
      if (lane == last) {
        index_ = base + last;
        begin_ = last_begin;
        current_ = run;
        map_ = map;
      }
      __syncwarp();
      break;
    }
    before = batch_end;
  }
  return owners == 1;
}

}  // namespace dilated::kernels::cuda::hopper

// From lists of runs to rows in memory: which position column c of a tile's concatenated, clipped
// runs has, and in which place of its tensor it lies.
//
// One warp reads the list together, 32 runs at a time: lane l clips run l, a scan over the lanes
// gives where each run's columns end, and each lane finds the run of its own columns by bisection.
// A tile that lies within one run, the common case, costs one multiply-add a column.
#pragma once

#include <dilated/pattern_layout.h>

#include <cstdint>

#include "kernels/cuda/primitives/numerics.cuh"

namespace dilated::kernels::cuda {

/// One column (or row) of a list.
struct Column {
  int32_t position, place;  // past the end of the list: those of the last column, so that loads
                            // stay legal
  uint32_t tag;  // the last 32 bits of its Run, but for the multiplicity past the end of the list

  __device__ uint32_t multiplicity() const { return tag & 0xffu; }
  __device__ static uint32_t stretch(uint32_t tag) { return tag >> 8 & 0xffu; }
  __device__ uint32_t head() const { return tag >> 16; }
  __device__ static uint32_t past_end(uint32_t tag) { return tag & ~0xffu; }
  /// -inf past the end.
  __device__ float log2_multiplicity() const {
    return log2_approx(static_cast<float>(multiplicity()));
  }
  /// What is added to a scaled score.
  __device__ float log_multiplicity() const { return log2_multiplicity() * kLn2; }
};

/// A run's positions that a window leaves.
struct ClippedRun {
  int32_t first, stride, count;
  uint32_t tag;
};

__device__ inline ClippedRun load_clipped(const Run* run, int32_t origin, const Window& window) {
  const int4 words = __ldg(reinterpret_cast<const int4*>(run));
  ClippedRun clipped{origin + words.x, words.y, words.z, static_cast<uint32_t>(words.w)};
  if (clipped.first < window.first) {
    const auto stride = static_cast<uint32_t>(clipped.stride);  // sums may pass 2^31
    const auto distance = static_cast<uint32_t>(window.first - clipped.first);
    const auto skip = static_cast<int32_t>(
        min((distance + stride - 1) / stride, static_cast<uint32_t>(clipped.count)));
    clipped.first += skip * clipped.stride;
    clipped.count -= skip;
  }
  if (clipped.count > 0 && clipped.first + clipped.stride * (clipped.count - 1) > window.last) {
    clipped.count =
        window.last < clipped.first ? 0 : (window.last - clipped.first) / clipped.stride + 1;
  }
  return clipped;
}

/// Reads a list from front to back. All lanes of a warp call it together, on cursors of their own
/// that are alike or on one in shared memory.
class ColumnCursor {
 public:
  /// Positions outside the window are dropped. shifts: of the runs' stretches.
  __device__ ColumnCursor(const Run* runs, int32_t run_count, int32_t origin, const int32_t* shifts,
                          const Window& window)
      : runs_(runs), shifts_(shifts), run_count_(run_count), origin_(origin), window_(window) {}

  /// columns[i] becomes column first + 32 * i + lane. `first` must not fall from call to call. True
  /// if all of them lie in one run.
  template <int kPerLane>
  __device__ bool read(int32_t first, Column (&columns)[kPerLane]) {
    const int32_t lane = threadIdx.x % 32;
    if (first + 32 * kPerLane <= begin_ + current_.count && first >= begin_) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int32_t position =
            current_.first + current_.stride * (first - begin_ + 32 * i + lane);
        columns[i] = {position, position + current_shift_, current_.tag};
      }
      return true;
    }
    search(first, columns);
    return false;
  }

 private:
  __device__ Column column_at(int32_t position, uint32_t tag) const {
    return {position, position + __ldg(shifts_ + Column::stretch(tag)), tag};
  }

  template <int kPerLane>
  __device__ void search(int32_t first, Column (&columns)[kPerLane]);

  const Run* runs_;
  const int32_t* shifts_;
  int32_t run_count_, origin_;
  Window window_;
  int32_t index_ = 0;  // run that current_ was read from
  int32_t begin_ = 0;  // columns before it
  ClippedRun current_{0, 1, 0, 0};
  int32_t current_shift_ = 0;
};

template <int kPerLane>
__device__ void ColumnCursor::search(int32_t first, Column (&columns)[kPerLane]) {
  const int32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    columns[i] = column_at(current_.first + current_.stride * (current_.count - 1),
                           Column::past_end(current_.tag));
  }
  for (int32_t base = index_, before = begin_; base < run_count_; base += 32) {
    ClippedRun run{0, 1, 0, 0};
    if (base + lane < run_count_) {
      run = load_clipped(runs_ + base + lane, origin_, window_);
    }
    int32_t end = run.count;  // becomes where the run ends, in columns
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int32_t below = __shfl_up_sync(kAllLanes, end, delta);
      end += lane >= delta ? below : 0;
    }
    end += before;
    const int32_t batch_end = __shfl_sync(kAllLanes, end, 31);
    const uint32_t occupied = __ballot_sync(kAllLanes, run.count > 0);
    const int32_t last = occupied == 0 ? 0 : 31 - __clz(occupied);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t column = first + 32 * i + lane;
      int32_t owner = 0;  // first run that ends after the column
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        owner += __shfl_sync(kAllLanes, end, owner + step - 1) <= column ? step : 0;
      }
      const bool past = column >= batch_end;
      owner = past ? last : owner;
      const int32_t owner_count = __shfl_sync(kAllLanes, run.count, owner);
      const int32_t owner_begin = __shfl_sync(kAllLanes, end, owner) - owner_count;
      const int32_t owner_first = __shfl_sync(kAllLanes, run.first, owner);
      const int32_t owner_stride = __shfl_sync(kAllLanes, run.stride, owner);
      const uint32_t owner_tag = __shfl_sync(kAllLanes, run.tag, owner);
      const int32_t rank = past ? owner_count - 1 : column - owner_begin;
      if (column >= before && occupied != 0) {
        columns[i] = column_at(owner_first + owner_stride * rank,
                               past ? Column::past_end(owner_tag) : owner_tag);
      }
    }
    // The next tile begins in, or after, the run that holds this tile's last column.
    const uint32_t reaching =
        __ballot_sync(kAllLanes, end >= first + 32 * kPerLane && run.count > 0);
    if (reaching != 0) {
      const int32_t owner = __ffs(reaching) - 1;
      const ClippedRun found{
          __shfl_sync(kAllLanes, run.first, owner), __shfl_sync(kAllLanes, run.stride, owner),
          __shfl_sync(kAllLanes, run.count, owner), __shfl_sync(kAllLanes, run.tag, owner)};
      const int32_t found_begin = __shfl_sync(kAllLanes, end, owner) - found.count;
      __syncwarp();
      index_ = base + owner;
      begin_ = found_begin;
      current_ = found;
      current_shift_ = __ldg(shifts_ + Column::stretch(found.tag));
      __syncwarp();
      return;
    }
    before = batch_end;
  }
}

}  // namespace dilated::kernels::cuda

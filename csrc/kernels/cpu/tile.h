// A tile as the arithmetic sees it: its rows are vector lanes, its columns come in chunks.
//
// Forward and in the backward over queries, lanes are queries and columns are keys; in the backward over keys it is the
// other way round. Causality is one comparison in all three: a pair exists iff lane order >= column order, where the
// order of a position p is p, or -p in the backward over keys.
#pragma once

#include <dilated/pattern_layout.h>

#include "kernels/attention.h"
#include "kernels/cpu/simd.h"
#include "kernels/dropout.h"

namespace dilated::kernels::cpu::DILATED_ISA {

inline constexpr int kChunk = 128;         // columns at a time
inline constexpr int kStraddleChunk = 32;  // likewise where the causal mask cuts through: fewer pairs in vain
inline constexpr int32_t kLastPosition = 0x7ffffffe;  // count_through() may add one to it

inline constexpr double kLog2E = 1.4426950408889634074;
inline constexpr double kLn2 = 0.69314718055994530942;

template <typename T>
struct Lanes {
  using Int = typename Simd<T>::Int;
  static constexpr int kVectors = kTileRows / kLanes<T>;

  int rows, vectors;  // vectors that hold the rows; lanes past the last row repeat it
  int32_t low, high;  // smallest and largest position
  int32_t position[kTileRows];
  alignas(64) Int order[kTileRows];
  alignas(64) uint32_t hash[kTileRows];  // dropout: xor with a column's gives what mix32 mixes
  alignas(64) T bias[kTileRows];         // added to scores, as Columns::bias
  alignas(64) T delta[kTileRows];        // subtracted from dP, as Columns::delta
  Int highest[kVectors];                 // order within each vector

  /// Rows first .. first + rows - 1 of the group's row runs.
  void place(const TableView& table, const Group& group, int32_t origin, int32_t first, int32_t count, bool reversed) {
    rows = count;
    vectors = (count + kLanes<T> - 1) / kLanes<T>;
    const Run* run = table.runs() + group.row_runs;
    for (int lane = 0; lane < count; ++run) {
      for (int32_t j = first; j < run->count && lane < count; ++j) {
        position[lane++] = origin + run->start + run->stride * j;
      }
      first = first > run->count ? first - run->count : 0;
    }
    low = high = position[0];
    for (int lane = 0; lane < vectors * kLanes<T>; ++lane) {
      position[lane] = position[lane < count ? lane : count - 1];
      low = position[lane] < low ? position[lane] : low;
      high = position[lane] > high ? position[lane] : high;
      order[lane] = reversed ? -position[lane] : position[lane];
      bias[lane] = delta[lane] = 0;
    }
    for (int v = 0; v < vectors; ++v) {
      highest[v] = order[v * kLanes<T>];
      for (int lane = 1; lane < kLanes<T>; ++lane) {
        const Int other = order[v * kLanes<T> + lane];
        highest[v] = other > highest[v] ? other : highest[v];
      }
    }
  }
};

/// A chunk's columns: what is one number for each of them.
template <typename T>
struct Columns {
  using Int = typename Simd<T>::Int;
  int count;
  Int lowest, highest;  // order
  alignas(64) Int order[kChunk];
  alignas(64) uint32_t hash[kChunk];
  alignas(64) T bias[kChunk];   // log2 of the multiplicity and what else is added to scores
  alignas(64) T delta[kChunk];

  void clear() {
    count = 0;
    lowest = kLastPosition;
    highest = -Int{kLastPosition};
  }
  void set_order(int column, Int value) {
    order[column] = value;
    lowest = value < lowest ? value : lowest;
    highest = value > highest ? value : highest;
  }
};

/// Part of one run: positions first + stride * j, 0 <= j < count.
struct Stretch {
  int32_t first, stride, count;
  int32_t head;
  int32_t multiplicity;
};

/// Walks the columns of a group at from <= position <= to, a stretch of at most `room` at a time.
class ColumnWalk {
 public:
  ColumnWalk(const TableView& table, const Group& group, int32_t origin, int32_t from, int32_t to)
      : run_(table.runs() + group.column_runs), end_(run_ + group.column_run_count), origin_(origin), from_(from), to_(to) {
    enter();
  }

  bool done() const { return run_ == end_; }

  Stretch next(int32_t room) {
    const int32_t left = stop_ - at_;
    const Stretch stretch{origin_ + run_->start + run_->stride * at_, run_->stride, left < room ? left : room,
                          run_->head, run_->multiplicity};
    at_ += stretch.count;
    if (at_ == stop_) {
      ++run_;
      enter();
    }
    return stretch;
  }

 private:
  /// Stops at the first run, from run_ on, that has a column to give.
  void enter() {
    for (; run_ != end_; ++run_) {
      at_ = count_through(*run_, origin_, from_ - 1);
      stop_ = count_through(*run_, origin_, to_);
      if (at_ < stop_) {
        return;
      }
    }
  }

  const Run* run_;
  const Run* end_;
  int32_t origin_, from_, to_;
  int32_t at_ = 0, stop_ = 0;
};

/// Cuts the columns that the lanes may see to chunks. fill(stretch, column) loads a stretch at that place of the chunk;
/// process(chunk, first_vector, masked) computes: vectors before first_vector see nothing of it.
template <typename T, typename Fill, typename Process>
inline void for_each_chunk(const TableView& table, const Group& group, int32_t origin, const Lanes<T>& lanes,
                           Columns<T>& columns, bool causal, bool reversed, Fill fill, Process process) {
  // What every lane sees, then what only some do.
  struct {
    int32_t from, to, room;
  } const passes[2] = {
      {causal && reversed ? lanes.high : 0, causal && !reversed ? lanes.low : kLastPosition, kChunk},
      {reversed ? lanes.low : lanes.low + 1, reversed ? lanes.high - 1 : lanes.high, kStraddleChunk}};
  for (int pass = 0; pass < (causal ? 2 : 1); ++pass) {
    ColumnWalk walk(table, group, origin, passes[pass].from, passes[pass].to);
    while (!walk.done()) {
      columns.clear();
      while (!walk.done() && columns.count < passes[pass].room) {
        const Stretch stretch = walk.next(passes[pass].room - columns.count);
        const T bias = stretch.multiplicity == 1 ? T{0} : static_cast<T>(__builtin_log2(stretch.multiplicity));
        for (int j = 0; j < stretch.count; ++j) {
          const int32_t position = stretch.first + stretch.stride * j;
          columns.bias[columns.count + j] = bias;
          columns.set_order(columns.count + j, reversed ? -position : position);
        }
        fill(stretch, columns.count);
        columns.count += stretch.count;
      }
      int first_vector = 0;
      while (pass == 1 && lanes.highest[first_vector] < columns.lowest) {
        ++first_vector;
      }
      process(first_vector, pass == 1);
    }
  }
}

inline constexpr uint32_t kKeyHash = 0x9e3779b9u;  // as in dropout_keeps()

}  // namespace dilated::kernels::cpu::DILATED_ISA

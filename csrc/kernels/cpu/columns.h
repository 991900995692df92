// The columns of a tile, in chunks: dense copies that all panels of the tile share.
#pragma once

#include <dilated/pattern_layout.h>

#include "kernels/cpu/lanes.h"
#include "kernels/cpu/simd.h"

namespace dilated::kernels::cpu::DILATED_ISA {

inline constexpr int kChunk = 192;  // columns at a time; a multiple of kBlockRows
inline constexpr int kStraddleChunk =
    32;  // likewise where the causal mask cuts through: fewer pairs in vain

// dropout_keeps() mixes row key ^ key position * this.
inline constexpr uint32_t kKeyHash = 0x9e3779b9u;

/// A chunk's columns: what is one number for each of them.
template <typename T>
struct Columns {
  using Int = typename Simd<T>::Int;
  int count;
  Int lowest, highest;  // order
  alignas(64) Int order[kChunk];
  alignas(64) uint32_t hash[kChunk];
  alignas(64) T bias[kChunk];   // log of the multiplicity: logit = score + bias
  alignas(64) T lse[kChunk];    // of queries: subtracted from logits
  alignas(64) T delta[kChunk];  // of queries: subtracted from dP

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
      : run_(table.runs() + group.column_runs),
        end_(run_ + group.column_run_count),
        origin_(origin),
        from_(from),
        to_(to) {
    enter();
  }

  bool done() const { return run_ == end_; }

  Stretch next(int32_t room) {
    const int32_t left = stop_ - at_;
    const Stretch stretch{origin_ + run_->start + run_->stride * at_, run_->stride,
                          left < room ? left : room, run_->head, run_->multiplicity};
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

/// What a panel sees of a chunk: vectors begin <= v < end, all of it unless masked.
struct Sight {
  int begin, end;
  bool masked;
};

template <typename T>
inline Sight sight_of(const Lanes<T>& lanes, const Columns<T>& columns, bool causal) {
  Sight sight{0, lanes.vectors, causal && columns.highest > lanes.lowest};
  if (sight.masked) {
    while (sight.begin < sight.end && lanes.highest[sight.begin] < columns.lowest) {
      ++sight.begin;
    }
    while (sight.begin < sight.end && lanes.highest[sight.end - 1] < columns.lowest) {
      --sight.end;
    }
  }
  return sight;
}

/// Cuts the columns that the panels may see to chunks. fill(stretch, column) loads a stretch at
/// that place of the chunk; process(panel, sight) computes.
template <typename T, typename Fill, typename Process>
inline void for_each_chunk(const TableView& table, const Group& group, int32_t origin,
                           const Panels<T>& panels, Columns<T>& columns, bool causal, bool reversed,
                           Fill fill, Process process) {
  // What every row sees, then what only some do.
  struct {
    int32_t from, to, room;
  } const passes[2] = {{causal && reversed ? panels.high : 0,
                        causal && !reversed ? panels.low : kLastPosition, kChunk},
                       {reversed ? panels.low : panels.low + 1,
                        reversed ? panels.high - 1 : panels.high, kStraddleChunk}};
  for (int pass = 0; pass < (causal ? 2 : 1); ++pass) {
    ColumnWalk walk(table, group, origin, passes[pass].from, passes[pass].to);
    while (!walk.done()) {
      columns.clear();
      while (!walk.done() && columns.count < passes[pass].room) {
        const Stretch stretch = walk.next(passes[pass].room - columns.count);
        const T bias =
            stretch.multiplicity == 1 ? T{0} : static_cast<T>(__builtin_log(stretch.multiplicity));
        for (int j = 0; j < stretch.count; ++j) {
          const int32_t position = stretch.first + stretch.stride * j;
          columns.bias[columns.count + j] = bias;
          columns.set_order(columns.count + j, reversed ? -position : position);
        }
        fill(stretch, columns.count);
        columns.count += stretch.count;
      }
      for (int panel = 0; panel < panels.count; ++panel) {
        const Sight sight = sight_of(panels.lanes[panel], columns, causal);
        if (sight.begin < sight.end) {
          process(panel, sight);
        }
      }
    }
  }
}

}  // namespace dilated::kernels::cpu::DILATED_ISA

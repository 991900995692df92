// The columns of a tile, in chunks: dense copies that all panels of the tile share.
#pragma once

#include <dilated/pattern_layout.h>

#include "kernels/cpu/lanes.h"
#include "kernels/cpu/simd.h"

namespace dilated::kernels::cpu::DILATED_ISA {

inline constexpr int kChunk = 192;  // columns at a time; a multiple of kBlockRows
// Where masks cut through, so that fewer pairs are wasted. Multiples of kBlockRows, 30 and 36, are
// no faster.
inline constexpr int kStraddleChunk = 32;

// dropout_keeps() mixes row key ^ key position * this.
inline constexpr uint32_t kKeyHash = 0x9e3779b9u;

/// A chunk's columns: what is one number for each of them.
template <typename T>
struct Columns {
  using Int = typename Simd<T>::Int;
  int count;
  int32_t lowest, highest;  // position
  alignas(64) Int position[kChunk];
  alignas(64) uint32_t hash[kChunk];
  alignas(64) T bias[kChunk];   // log of the multiplicity
  alignas(64) T lse[kChunk];    // of queries: subtracted from logits
  alignas(64) T delta[kChunk];  // of queries: subtracted from dP

  void clear() {
    count = 0;
    lowest = kLastPosition;
    highest = 0;
  }
  void set_position(int column, int32_t value) {
    position[column] = value;
    lowest = value < lowest ? value : lowest;
    highest = value > highest ? value : highest;
  }
};

/// Part of one run: positions first + stride * j, 0 <= j < count, at places place + stride * j.
struct RunPart {
  int32_t first, stride, count;
  int32_t place;
  int32_t head;
  int32_t multiplicity;
};

/// Walks the columns of a tile at window.first <= position <= window.last, a part of at most `room`
/// at a time.
class ColumnWalk {
 public:
  ColumnWalk(const RowList& list, const Window& window)
      : run_(list.table.runs() + list.group.column_runs),
        end_(run_ + list.group.column_run_count),
        shifts_(list.table.shifts() + list.tile.first_stretch),
        origin_(list.tile.origin),
        window_(window) {
    enter();
  }

  bool done() const { return run_ == end_; }

  RunPart next(int32_t room) {
    const int32_t left = stop_ - at_;
    const int32_t first = origin_ + run_->start + run_->stride * at_;
    const RunPart part{
        first,      run_->stride,      left < room ? left : room, first + shifts_[run_->stretch],
        run_->head, run_->multiplicity};
    at_ += part.count;
    if (at_ == stop_) {
      ++run_;
      enter();
    }
    return part;
  }

 private:
  /// Stops at the first run, from run_ on, that has a column to give.
  void enter() {
    for (; run_ != end_; ++run_) {
      at_ = count_through(*run_, origin_, window_.first - 1);
      stop_ = count_through(*run_, origin_, window_.last);
      if (at_ < stop_) {
        return;
      }
    }
  }

  const Run* run_;
  const Run* end_;
  const int32_t* shifts_;
  int32_t origin_;
  Window window_;
  int32_t at_ = 0, stop_ = 0;
};

/// What a panel sees of a chunk: vectors begin <= v < end, all of it unless masked.
struct Sight {
  int begin, end;
  bool masked;
};

template <typename T>
inline Sight sight_of(const Lanes<T>& lanes, const Columns<T>& columns) {
  const Window& all = lanes.windows.all;
  Sight sight{0, lanes.vectors, columns.lowest < all.first || columns.highest > all.last};
  const auto is_blind = [&](int vector) {
    const Window& some = lanes.vector_windows[vector].some;
    return some.last < columns.lowest || some.first > columns.highest;
  };
  while (sight.masked && sight.begin < sight.end && is_blind(sight.begin)) {
    ++sight.begin;
  }
  while (sight.masked && sight.begin < sight.end && is_blind(sight.end - 1)) {
    --sight.end;
  }
  return sight;
}

/// Cuts the columns that the panels may see into chunks. fill(part, column) loads a part of a run
/// from column `column` of the chunk on; process(panel, sight) computes.
template <typename T, typename Fill, typename Process>
inline void for_each_chunk(const RowList& list, const Panels<T>& panels, Columns<T>& columns,
                           Fill fill, Process process) {
  const auto& [some, all] = panels.windows;
  const bool has_common = all.first <= all.last;
  // What every row sees, then what only some do.
  struct {
    Window window;
    int32_t room;
  } const passes[3] = {
      {has_common ? all : Window{some.first, some.last}, has_common ? kChunk : kStraddleChunk},
      {{some.first, all.first - 1}, kStraddleChunk},
      {{all.last + 1, some.last}, kStraddleChunk}};
  for (int pass = 0; pass < (has_common ? 3 : 1); ++pass) {
    if (passes[pass].window.first > passes[pass].window.last) {
      continue;
    }
    ColumnWalk walk(list, passes[pass].window);
    while (!walk.done()) {
      columns.clear();
      while (!walk.done() && columns.count < passes[pass].room) {
        const RunPart part = walk.next(passes[pass].room - columns.count);
        const T bias =
            part.multiplicity == 1 ? T{0} : static_cast<T>(__builtin_log(part.multiplicity));
        for (int j = 0; j < part.count; ++j) {
          columns.bias[columns.count + j] = bias;
          columns.set_position(columns.count + j, part.first + part.stride * j);
        }
        fill(part, columns.count);
        columns.count += part.count;
      }
      for (int panel = 0; panel < panels.count; ++panel) {
        const Sight sight = sight_of(panels.lanes[panel], columns);
        if (sight.begin < sight.end) {
          process(panel, sight);
        }
      }
    }
  }
}

}  // namespace dilated::kernels::cpu::DILATED_ISA

// Backward pass of one tile over keys: S = Q K^T, dP = dO V^T, dV^T += dO^T P and dK^T += Q^T dS
// stay in the tile, and dQ += dS K goes to sums that the caller holds.
#pragma once

#include "kernels/cpu/backward_tile.h"

namespace dilated::kernels::cpu::DILATED_ISA {

template <typename Element>
struct BackwardKeysTile : BackwardTile<Element> {
  using Base = BackwardTile<Element>;
  using T = typename Base::T;
  using Base::args, Base::head_dim, Base::padded, Base::s, Base::scale, Base::shared_by, Base::task;

  const MutableRows& sums;
  int summed = 0;       // columns whose dQ is not yet added to the sums
  T* sum_rows[kChunk];  // where it goes

  BackwardKeysTile(const BackwardArgs& args, const TileTask& task, const MutableRows& sums,
                   BackwardScratch<T>& scratch)
      : Base{args, task, PatternView{args.pattern}.transposed(), true, scratch}, sums(sums) {}

  void start(int panel) {
    Lanes<T>& lanes = s.panels.lanes[panel];
    const BackwardPanel<T>& packed = s.packed[panel];
    for (int lane = 0; lane < lanes.rows; ++lane) {
      const int64_t row = lanes.position[lane] + task.tile.row_shift;
      const Element* key = row_at<Element>(args.key, task.batch, row, task.head);
      pack_lane(packed.left, lane, key, head_dim, T{1});
      pack_lane(packed.right, lane, row_at<Element>(args.value, task.batch, row, task.head),
                head_dim, T{1});
      for (int64_t d = 0; d < head_dim; ++d) {
        packed.key_rows[lane * padded + d] = widen(key[d]) * scale;
      }
      lanes.hash[lane] = Base::key_hash(lanes.position[lane]);
    }
  }

  void fill(const RunPart& part, int column) {
    add_sums();
    const int64_t head = task.head * shared_by + part.head;
    Base::gather(args.query, head, part, column, s.column_left, scale);
    Base::gather(args.grad_out, head, part, column, s.column_right);
    for (int j = 0; j < part.count; ++j) {
      const int64_t row = part.place + part.stride * j;
      const int64_t at = Base::statistics_at(head, row);
      s.columns.lse[column + j] = Base::query_lse(at);
      s.columns.delta[column + j] = Base::query_delta(at);
      s.columns.hash[column + j] = Base::query_hash(head, part.first + part.stride * j);
      sum_rows[column + j] =
          sums.data == nullptr ? nullptr : row_at<T>(sums, task.batch, row, head);
    }
  }

  void process(int panel, const Sight& sight) {
    const BackwardPanel<T>& packed = s.packed[panel];
    Base::score(panel, sight);
    Base::add_to_lanes(sight, s.column_left, s.gradients, packed.grad_left);
    Base::add_to_lanes(sight, s.column_right, s.scores, packed.grad_right);
    if (sums.data == nullptr) {
      return;
    }
    const int begin = sight.begin * kLanes<T>;
    const int end = sight.end * kLanes<T>;
    const int rows_end = s.panels.lanes[panel].rows < end ? s.panels.lanes[panel].rows : end;
    gemm<T>(s.columns.count, static_cast<int>(padded) / kLanes<T>, rows_end - begin,
            {s.gradients + begin, kPanelRows, 1}, {packed.key_rows + begin * padded, padded},
            {s.query_sum, padded}, summed != 0);
    summed = s.columns.count;
  }

  /// Adds the last chunk's dS K, of all panels, to the sums of its queries.
  void add_sums() {
    for (int c = 0; c < summed; ++c) {
      const T* from = s.query_sum + c * padded;
      T* __restrict to = sum_rows[c];
      for (int64_t d = 0; d < head_dim; ++d) {
        to[d] += from[d];
      }
    }
    summed = 0;
  }

  void finish(int panel) {
    add_sums();
    const Lanes<T>& lanes = s.panels.lanes[panel];
    for (int lane = 0; lane < lanes.rows; ++lane) {
      const int64_t row = lanes.position[lane] + task.tile.row_shift;
      Base::write_row(args.grad_key, row, s.packed[panel].grad_left, lane, T{1});
      Base::write_row(args.grad_value, row, s.packed[panel].grad_right, lane, T{1});
    }
  }
};

}  // namespace dilated::kernels::cpu::DILATED_ISA

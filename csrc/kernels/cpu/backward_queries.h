// Backward pass of one tile over queries: S^T = K Q^T, dP^T = V dO^T and dQ^T += K^T dS^T.
#pragma once

#include "kernels/cpu/backward_tile.h"

namespace dilated::kernels::cpu::DILATED_ISA {

template <typename Element>
struct BackwardQueriesTile : BackwardTile<Element> {
  using Base = BackwardTile<Element>;
  using T = typename Base::T;
  using Base::args, Base::head_dim, Base::s, Base::scale, Base::shared_by, Base::task;

  BackwardQueriesTile(const BackwardArgs& args, const TileTask& task, BackwardScratch<T>& scratch)
      : Base{args, task, PatternView{args.pattern}.forward(), false, scratch} {}

  void start(int panel) {
    Lanes<T>& lanes = s.panels.lanes[panel];
    for (int lane = 0; lane < lanes.rows; ++lane) {
      const int32_t position = lanes.position[lane];
      const int64_t row = position + task.tile.row_shift;
      pack_lane(s.packed[panel].left, lane, row_at<Element>(args.query, task.batch, row, task.head),
                head_dim, scale);
      pack_lane(s.packed[panel].right, lane,
                row_at<Element>(args.grad_out, task.batch, row, task.head), head_dim, T{1});
      const int64_t at = Base::statistics_at(task.head, row);
      lanes.lse[lane] = Base::query_lse(at);
      lanes.delta[lane] = Base::query_delta(at);
      lanes.hash[lane] = Base::query_hash(task.head, position);
    }
  }

  void fill(const RunPart& part, int column) {
    const int64_t kv_head = task.head / shared_by;
    Base::gather(args.key, kv_head, part, column, s.column_left);
    Base::gather(args.value, kv_head, part, column, s.column_right);
    for (int j = 0; j < part.count; ++j) {
      s.columns.lse[column + j] = s.columns.delta[column + j] = 0;
      s.columns.hash[column + j] = Base::key_hash(part.first + part.stride * j);
    }
  }

  void process(int panel, const Sight& sight) {
    Base::score(panel, sight);
    Base::add_to_lanes(sight, s.column_left, s.gradients, s.packed[panel].grad_left);
  }

  void finish(int panel) {
    const Lanes<T>& lanes = s.panels.lanes[panel];
    for (int lane = 0; lane < lanes.rows; ++lane) {
      const int64_t row = lanes.position[lane] + task.tile.row_shift;
      Base::write_row(args.grad_query, row, s.packed[panel].grad_left, lane, scale);
    }
  }
};

}  // namespace dilated::kernels::cpu::DILATED_ISA

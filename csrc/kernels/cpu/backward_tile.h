// Backward pass of one tile: what its two directions share.
//
// Over keys (backward_keys.h, the transposed table), lanes are key rows and columns are queries.
// Over queries (backward_queries.h, the forward table), lanes are query rows and columns are keys.
// The first alone takes five products a pair, and tiles share rows of dQ; both, the first without
// dQ, take seven, and no two tiles write the same row.
#pragma once

#include "kernels/cpu/columns.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/score.h"
#include "kernels/cpu/tile_kernels.h"
#include "kernels/dropout.h"

namespace dilated::kernels::cpu::DILATED_ISA {

/// The rows of one panel, [head_dim][kPanelRows]: keys and values, or queries times scale and
/// grad_out, and the gradients of keys and values, or of queries before their scale.
template <typename T>
struct BackwardPanel {
  T *left, *right, *grad_left, *grad_right;
  T* key_rows;  // [kPanelRows][padded]: the keys once more, times scale, for dQ
};

template <typename T>
struct BackwardScratch {
  Panels<T> panels;
  Columns<T> columns;
  BackwardPanel<T> packed[kPanels];
  alignas(64) T scores[kChunk * kPanelRows];     // then P after dropout
  alignas(64) T gradients[kChunk * kPanelRows];  // dP, then dS
  // Columns: queries times scale and grad_out, or keys and values, [kChunk][head_dim].
  T *column_left, *column_right;
  T* query_sum;  // [kChunk][padded]: dS K of a chunk

  static int64_t padded(int64_t head_dim) {
    return (head_dim + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  }
  static int64_t panel_numbers(int64_t head_dim) {
    return (4 * kPanels * kPanelRows + 2 * kChunk) * head_dim +
           (kPanels * kPanelRows + kChunk) * padded(head_dim);
  }
  void lay_out(T* at, int64_t head_dim) {
    const auto take = [&](int64_t numbers) {
      T* const taken = at;
      at += numbers;
      return taken;
    };
    for (BackwardPanel<T>& panel : packed) {
      panel.left = take(kPanelRows * head_dim);
      panel.right = take(kPanelRows * head_dim);
      panel.grad_left = take(kPanelRows * head_dim);
      panel.grad_right = take(kPanelRows * head_dim);
      panel.key_rows = take(kPanelRows * padded(head_dim));
    }
    query_sum = take(kChunk * padded(head_dim));
    column_left = take(kChunk * head_dim);
    column_right = take(kChunk * head_dim);
  }
};

struct DropRule {
  uint32_t threshold;
  double inverse_kept;
};

/// scores -> P (after dropout), gradients: dP -> dS, of one vector of rows.
template <typename T, bool kMasked, bool kDropped>
inline void differentiate_vector(BackwardScratch<T>& s, int panel, int lane, const DropRule& rule) {
  const Columns<T>& columns = s.columns;
  const Lanes<T>& lanes = s.panels.lanes[panel];
  const auto first = load_as<IntVector<T>>(lanes.first + lane);
  const auto last = load_as<IntVector<T>>(lanes.last + lane);
  const auto hash = load_as<HashVector<T>>(lanes.hash + lane);
  const Vector<T> lane_lse = load(lanes.lse + lane);
  const Vector<T> lane_delta = load(lanes.delta + lane);
  const T inverse_kept = static_cast<T>(rule.inverse_kept);
  for (int c = 0; c < columns.count; ++c) {
    T* const score = s.scores + c * kPanelRows + lane;
    T* const gradient = s.gradients + c * kPanelRows + lane;
    Vector<T> p =
        softmax_weight<T>(logit_of<T>(load(score), columns.bias[c]), lane_lse + columns.lse[c]);
    Vector<T> grad = load(gradient);
    if constexpr (kMasked) {
      p = masked<T>(p, first, last, columns.position[c], Vector<T>{});
    }
    Vector<T> dropped = p;
    if constexpr (kDropped) {
      const IntVector<T> keeps = keep_mask<T>(hash ^ columns.hash[c], rule.threshold);
      dropped = keeps ? p * inverse_kept : Vector<T>{};
      grad = keeps ? grad * inverse_kept : Vector<T>{};
    }
    store(score, dropped);
    store(gradient, score_gradient<T>(p, grad, lane_delta + columns.delta[c]));
  }
}

template <typename T>
inline void differentiate(BackwardScratch<T>& s, int panel, const Sight& sight,
                          const DropRule& rule) {
  for (int v = sight.begin; v < sight.end; ++v) {
    const int lane = v * kLanes<T>;
    if (rule.threshold != 0) {
      sight.masked ? differentiate_vector<T, true, true>(s, panel, lane, rule)
                   : differentiate_vector<T, false, true>(s, panel, lane, rule);
    } else {
      sight.masked ? differentiate_vector<T, true, false>(s, panel, lane, rule)
                   : differentiate_vector<T, false, false>(s, panel, lane, rule);
    }
  }
}

/// A tile in either direction.
template <typename Element>
struct BackwardTile {
  using T = Compute<Element>;
  const BackwardArgs& args;
  const TileTask& task;
  const TableView table;
  const bool over_keys;
  BackwardScratch<T>& s;

  const Group& group = table.groups()[task.tile.group];
  const RowList rows{table, group, task.tile, args.is_causal, over_keys};
  const int64_t head_dim = args.head_dim;
  const int64_t padded = BackwardScratch<T>::padded(head_dim);
  const int64_t shared_by = args.heads / args.kv_heads;
  const T scale = static_cast<T>(sizeof(T) == 8 ? args.scale64 : static_cast<double>(args.scale));
  const DropRule rule{dropout_threshold(args.dropout.probability), 1 / args.dropout.kept};

  /// The row's number in [batch, heads, queries], as lse and delta are laid out.
  int64_t statistics_at(int64_t head, int64_t row) const {
    return (task.batch * args.heads + head) * args.queries + row;
  }

  T query_lse(int64_t at) const { return weight_lse(static_cast<const T*>(args.lse)[at]); }

  T query_delta(int64_t at) const { return static_cast<const T*>(args.delta)[at]; }

  uint32_t query_hash(int64_t head, int32_t position) const {
    return rule.threshold == 0 ? 0
                               : dropout_row_key(*args.dropout.seed, task.entry(), head, position);
  }

  static uint32_t key_hash(int32_t position) { return static_cast<uint32_t>(position) * kKeyHash; }

  void gather(const Rows& from, int64_t head, const RunPart& part, int column, T* to,
              T factor = T{1}) const {
    gather_rows(to + column * head_dim, row_at<Element>(from, task.batch, part.place, head),
                from.strides.row * part.stride, part.count, head_dim, factor);
  }

  /// Zeroes the panel's matrices.
  void clear_panel(int panel) const {
    const Lanes<T>& lanes = s.panels.lanes[panel];
    clear_vectors(s.packed[panel].left, 4 * head_dim, lanes.vectors);
    __builtin_memset(s.packed[panel].key_rows, 0,
                     sizeof(T) * static_cast<size_t>(lanes.rows * padded));
  }

  /// S and dP of a chunk, then P and dS in their places.
  void score(int panel, const Sight& sight) {
    const int lane = sight.begin * kLanes<T>;
    const int vectors = sight.end - sight.begin;
    gemm<T>(s.columns.count, vectors, head_dim, {s.column_left, head_dim, 1},
            {s.packed[panel].left + lane, kPanelRows}, {s.scores + lane, kPanelRows}, false);
    gemm<T>(s.columns.count, vectors, head_dim, {s.column_right, head_dim, 1},
            {s.packed[panel].right + lane, kPanelRows}, {s.gradients + lane, kPanelRows}, false);
    differentiate(s, panel, sight, rule);
  }

  /// grad += columns^T weights, [head_dim][lanes].
  void add_to_lanes(const Sight& sight, const T* columns, const T* weights, T* grad) {
    const int lane = sight.begin * kLanes<T>;
    gemm<T>(static_cast<int>(head_dim), sight.end - sight.begin, s.columns.count,
            {columns, 1, head_dim}, {weights + lane, kPanelRows}, {grad + lane, kPanelRows}, true);
  }

  /// Row <- column `lane` of a panel * factor, of task.head.
  void write_row(const MutableRows& to, int64_t row, const T* panel, int lane, T factor) const {
    args.is_partial
        ? unpack_lane(row_at<T>(to, task.batch, row, task.head), panel, lane, head_dim, factor)
        : unpack_lane(row_at<Element>(to, task.batch, row, task.head), panel, lane, head_dim,
                      factor);
  }

  /// start(panel), then fill and process for every chunk, then finish(panel).
  template <typename Start, typename Fill, typename Process, typename Finish>
  void run(Start start, Fill fill, Process process, Finish finish) {
    for (int32_t first = 0; first < task.tile.rows; first += kPanels * kPanelRows) {
      s.panels.place(rows, first);
      for (int panel = 0; panel < s.panels.count; ++panel) {
        clear_panel(panel);
        start(panel);
      }
      for_each_chunk(rows, s.panels, s.columns, fill, process);
      for (int panel = 0; panel < s.panels.count; ++panel) {
        finish(panel);
      }
    }
  }
};

template <typename T>
BackwardScratch<T>& backward_scratch(void* scratch, int64_t head_dim) {
  auto& s = *static_cast<BackwardScratch<T>*>(scratch);
  s.lay_out(reinterpret_cast<T*>(&s + 1), head_dim);
  return s;
}

template <typename Tile>
void run_backward(Tile tile) {
  tile.run([&](int panel) { tile.start(panel); },
           [&](const RunPart& part, int column) { tile.fill(part, column); },
           [&](int panel, const Sight& sight) { tile.process(panel, sight); },
           [&](int panel) { tile.finish(panel); });
}

}  // namespace dilated::kernels::cpu::DILATED_ISA

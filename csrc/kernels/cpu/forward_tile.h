// Forward pass of one tile: out and lse of up to 256 query rows at a time.
//
// Everything is transposed, so that query rows are lanes: S^T = K Q^T, a running softmax down the
// columns of S^T, and O^T += V^T P^T. The scale is folded into the packed queries, as in the
// backward, so that both passes round a score alike; logarithms of multiplicities are biases.
#pragma once

#include "kernels/cpu/columns.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/running.h"
#include "kernels/cpu/score.h"
#include "kernels/cpu/tile_kernels.h"
#include "kernels/dropout.h"

namespace dilated::kernels::cpu::DILATED_ISA {

/// What is summed up for the rows of one panel.
template <typename T>
struct ForwardPanel {
  alignas(64) T highest[kPanelRows];  // running maximum of each row's logits
  alignas(64) T total[kPanelRows];    // running sum of exp(logit - highest)
  T *queries, *out;                   // [head_dim][kPanelRows]
};

template <typename T>
struct ForwardScratch {
  Panels<T> panels;
  Columns<T> columns;
  ForwardPanel<T> sums[kPanels];
  alignas(64) T scores[kChunk * kPanelRows];
  T *keys, *values;  // [kChunk][head_dim]

  static int64_t panel_numbers(int64_t head_dim) {
    return (2 * kPanels * kPanelRows + 2 * kChunk) * head_dim;
  }
  void lay_out(T* at, int64_t head_dim) {
    for (ForwardPanel<T>& panel : sums) {
      panel.queries = at;
      panel.out = at + kPanelRows * head_dim;
      at += 2 * kPanelRows * head_dim;
    }
    keys = at;
    values = keys + kChunk * head_dim;
  }
};

/// Scores -> weights relative to the running maximum, of one vector of rows; earlier sums are
/// rescaled.
template <typename T, bool kMasked>
inline void softmax_vector(ForwardScratch<T>& s, int panel, int lane, int64_t head_dim) {
  const Columns<T>& columns = s.columns;
  ForwardPanel<T>& sums = s.sums[panel];
  const auto first = load_as<IntVector<T>>(s.panels.lanes[panel].first + lane);
  const auto last = load_as<IntVector<T>>(s.panels.lanes[panel].last + lane);
  const Vector<T> minus_infinity = Vector<T>{} - static_cast<T>(__builtin_inf());
  const auto logit = [&](int c) {
    const Vector<T> x = logit_of<T>(load(s.scores + c * kPanelRows + lane), columns.bias[c]);
    return kMasked ? masked<T>(x, first, last, columns.position[c], minus_infinity) : x;
  };
  const Vector<T> before = load(sums.highest + lane);
  Vector<T> highest = before;
  for (int c = 0; c < columns.count; ++c) {
    highest = maximum<T>(logit(c), highest);
  }
  store(sums.highest + lane, highest);
  const Vector<T> base = highest > minus_infinity ? highest : Vector<T>{};
  Vector<T> total{};
  for (int c = 0; c < columns.count; ++c) {
    const Vector<T> p = exp<T>(logit(c) - base);
    total += p;
    store(s.scores + c * kPanelRows + lane, p);
  }
  const Vector<T> rescale = exp<T>(before - base);
  store(sums.total + lane, load(sums.total + lane) * rescale + total);
  for (int64_t d = 0; d < head_dim; ++d) {
    T* out = sums.out + d * kPanelRows + lane;
    store(out, load(out) * rescale);
  }
}

template <typename T>
inline void drop(ForwardScratch<T>& s, int panel, int lane, uint32_t threshold) {
  const auto hash = load_as<HashVector<T>>(s.panels.lanes[panel].hash + lane);
  for (int c = 0; c < s.columns.count; ++c) {
    T* p = s.scores + c * kPanelRows + lane;
    store(p, keep_mask<T>(hash ^ s.columns.hash[c], threshold) ? load(p) : Vector<T>{});
  }
}

template <typename Element>
struct ForwardTile {
  using T = Compute<Element>;
  const ForwardArgs& args;
  const TileTask& task;
  ForwardScratch<T>& s;

  const TableView table = PatternView{args.pattern}.forward();
  const Group& group = table.groups()[task.tile.group];
  const RowList rows{table, group, task.tile, args.is_causal, /*over_keys=*/false};
  const int64_t head_dim = args.head_dim;
  const int64_t kv_head = task.head / (args.heads / args.kv_heads);
  const uint32_t threshold = dropout_threshold(args.dropout.probability);

  /// Packs the panel's queries and starts its sums, with the zero keys alone.
  void start_panel(int panel) {
    const Lanes<T>& lanes = s.panels.lanes[panel];
    ForwardPanel<T>& sums = s.sums[panel];
    const double scale = sizeof(T) == 8 ? args.scale64 : static_cast<double>(args.scale);
    clear_vectors(sums.queries, 2 * head_dim, lanes.vectors);  // and out
    for (int lane = 0; lane < kPanelRows; ++lane) {
      sums.highest[lane] = group.zero_keys != 0 ? T{0} : -static_cast<T>(__builtin_inf());
      sums.total[lane] = static_cast<T>(group.zero_keys);
    }
    for (int lane = 0; lane < lanes.rows; ++lane) {
      const int64_t row = lanes.position[lane] + task.tile.row_shift;
      pack_lane(sums.queries, lane, row_at<Element>(args.query, task.batch, row, task.head),
                head_dim, static_cast<T>(scale));
      if (threshold != 0) {
        s.panels.lanes[panel].hash[lane] =
            dropout_row_key(*args.dropout.seed, task.entry(), task.head, lanes.position[lane]);
      }
    }
  }

  void fill(const RunPart& part, int column) {
    const bool is_far = part.place >= args.keys;
    const int64_t row = part.place - (is_far ? args.keys : 0);
    const auto gather = [&](const Rows& rows, T* to) {
      gather_rows(to + column * head_dim, row_at<Element>(rows, task.batch, row, kv_head),
                  rows.strides.row * part.stride, part.count, head_dim, T{1});
    };
    gather(is_far ? args.far_key : args.key, s.keys);
    gather(is_far ? args.far_value : args.value, s.values);
    for (int j = 0; j < part.count; ++j) {
      s.columns.hash[column + j] = static_cast<uint32_t>(part.first + part.stride * j) * kKeyHash;
    }
  }

  void process(int panel, const Sight& sight) {
    const int lane = sight.begin * kLanes<T>;
    const int vectors = sight.end - sight.begin;
    gemm<T>(s.columns.count, vectors, head_dim, {s.keys, head_dim, 1},
            {s.sums[panel].queries + lane, kPanelRows}, {s.scores + lane, kPanelRows}, false);
    for (int v = sight.begin; v < sight.end; ++v) {
      sight.masked ? softmax_vector<T, true>(s, panel, v * kLanes<T>, head_dim)
                   : softmax_vector<T, false>(s, panel, v * kLanes<T>, head_dim);
      if (threshold != 0) {
        drop(s, panel, v * kLanes<T>, threshold);
      }
    }
    gemm<T>(static_cast<int>(head_dim), vectors, s.columns.count, {s.values, 1, head_dim},
            {s.scores + lane, kPanelRows}, {s.sums[panel].out + lane, kPanelRows}, true);
  }

  /// Divides by the sums, merges with the running result, rounds once and writes.
  template <typename Stored>
  void write_panel(int panel) {
    const Lanes<T>& lanes = s.panels.lanes[panel];
    const ForwardPanel<T>& sums = s.sums[panel];
    const int64_t first = (task.batch * args.heads + task.head) * args.queries;
    const T kept = static_cast<T>(args.dropout.kept);
    const T minus_infinity = -static_cast<T>(__builtin_inf());
    for (int lane = 0; lane < lanes.rows; ++lane) {
      const int64_t row = lanes.position[lane] + task.tile.row_shift;
      const T total = sums.total[lane];
      const bool empty = total == 0;
      const T block_lse =
          empty ? minus_infinity : sums.highest[lane] + static_cast<T>(__builtin_log(total));
      const T running_lse = args.running_lse == nullptr
                                ? minus_infinity
                                : static_cast<const T*>(args.running_lse)[first + row];
      const Merged<T> merged = merge(running_lse, block_lse);
      static_cast<T*>(args.lse)[first + row] = merged.lse;
      const T factor = empty ? T{0} : merged.block_weight / (total * kept);
      Stored* out = row_at<Stored>(args.out, task.batch, row, task.head);
      if (running_lse == minus_infinity) {
        unpack_lane(out, sums.out, lane, head_dim, factor);
      } else {
        unpack_lane(out, sums.out, lane, head_dim, factor,
                    row_at<T>(args.running_out, task.batch, row, task.head), merged.running_weight);
      }
    }
  }

  void run() {
    for (int32_t first = 0; first < task.tile.rows; first += kPanels * kPanelRows) {
      s.panels.place(rows, first);
      for (int panel = 0; panel < s.panels.count; ++panel) {
        start_panel(panel);
      }
      for_each_chunk(
          rows, s.panels, s.columns, [&](const RunPart& part, int column) { fill(part, column); },
          [&](int panel, const Sight& sight) { process(panel, sight); });
      for (int panel = 0; panel < s.panels.count; ++panel) {
        args.is_partial ? write_panel<T>(panel) : write_panel<Element>(panel);
      }
    }
  }
};

template <typename Element>
void forward_tile(const ForwardArgs& args, const TileTask& task, void* scratch) {
  using T = Compute<Element>;
  auto& s = *static_cast<ForwardScratch<T>*>(scratch);
  s.lay_out(reinterpret_cast<T*>(&s + 1), args.head_dim);
  ForwardTile<Element>{args, task, s}.run();
}

}  // namespace dilated::kernels::cpu::DILATED_ISA

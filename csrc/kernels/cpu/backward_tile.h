// Backward pass of one tile, over keys (the transposed table) or over queries (the forward one).
//
// Over keys, lanes are key rows and columns are queries: S = Q K^T, dP = dO V^T, then dV^T += dO^T P and dK^T += Q^T dS
// stay in the tile, and dQ += dS K goes to the sums. Over queries, lanes are query rows and columns are keys: S^T, dP^T
// and dQ^T += K^T dS^T. The first alone is five products; both, the first without dQ, are seven but share nothing.
#pragma once

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/tile.h"
#include "kernels/cpu/tile_kernels.h"

namespace dilated::kernels::cpu::DILATED_ISA {

template <typename T>
struct BackwardScratch {
  Lanes<T> lanes;
  Columns<T> columns;
  alignas(64) T scores[kChunk * kTileRows];     // then P after dropout
  alignas(64) T gradients[kChunk * kTileRows];  // dP, then dS
  // Lanes: keys and values, or queries and grad_out, [head_dim][kTileRows]; and the gradients of the lanes' rows.
  T *lane_left, *lane_right, *grad_left, *grad_right;
  // Columns: queries and grad_out, or keys and values, [kChunk][head_dim].
  T *column_left, *column_right;
  T* key_rows;   // [kTileRows][padded], scaled
  T* query_sum;  // [kChunk][padded]: dS K of a chunk

  static int64_t padded(int64_t head_dim) { return (head_dim + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }
  static int64_t panels(int64_t head_dim) {
    return (4 * kTileRows + 2 * kChunk) * head_dim + (kTileRows + kChunk) * padded(head_dim);
  }
  void lay_out(T* at, int64_t head_dim) {
    const auto take = [&](int64_t numbers) {
      T* const taken = at;
      at += numbers;
      return taken;
    };
    lane_left = take(kTileRows * head_dim);
    lane_right = take(kTileRows * head_dim);
    grad_left = take(kTileRows * head_dim);
    grad_right = take(kTileRows * head_dim);
    key_rows = take(kTileRows * padded(head_dim));
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
inline void differentiate_vector(BackwardScratch<T>& s, int lane, const DropRule& rule) {
  const Columns<T>& columns = s.columns;
  const auto order = load_as<IntVector<T>>(s.lanes.order + lane);
  const auto hash = load_as<HashVector<T>>(s.lanes.hash + lane);
  const Vector<T> lane_bias = load(s.lanes.bias + lane);
  const Vector<T> lane_delta = load(s.lanes.delta + lane);
  const T inverse_kept = static_cast<T>(rule.inverse_kept);
  for (int c = 0; c < columns.count; ++c) {
    T* const score = s.scores + c * kTileRows + lane;
    T* const gradient = s.gradients + c * kTileRows + lane;
    Vector<T> p = exp2<T>(load(score) + (lane_bias + columns.bias[c]));
    Vector<T> grad = load(gradient);
    if constexpr (kMasked) {
      p = order >= columns.order[c] ? p : Vector<T>{};
    }
    Vector<T> dropped = p;
    if constexpr (kDropped) {
      const IntVector<T> keeps = keep_mask<T>(hash ^ columns.hash[c], rule.threshold);
      dropped = keeps ? p * inverse_kept : Vector<T>{};
      grad = keeps ? grad * inverse_kept : Vector<T>{};
    }
    store(score, dropped);
    store(gradient, p * (grad - (lane_delta + columns.delta[c])));
  }
}

template <typename T>
inline void differentiate(BackwardScratch<T>& s, int first_vector, bool masked, const DropRule& rule) {
  for (int v = first_vector; v < s.lanes.vectors; ++v) {
    const int lane = v * kLanes<T>;
    if (rule.threshold != 0) {
      masked ? differentiate_vector<T, true, true>(s, lane, rule) : differentiate_vector<T, false, true>(s, lane, rule);
    } else {
      masked ? differentiate_vector<T, true, false>(s, lane, rule)
             : differentiate_vector<T, false, false>(s, lane, rule);
    }
  }
}

/// What one tile of the backward knows, shared by both directions.
template <typename Element>
struct BackwardTile {
  using T = Compute<Element>;
  const BackwardArgs& args;
  const TileTask& task;
  TableView table;
  bool over_keys;
  BackwardScratch<T>& s;

  const Header& header = PatternView{args.pattern}.header();
  const Group& group = table.groups()[task.tile->group];
  const int64_t head_dim = args.head_dim;
  const int64_t padded = BackwardScratch<T>::padded(head_dim);
  const int64_t shared_by = args.heads / args.kv_heads;
  const T scale = static_cast<T>(sizeof(T) == 8 ? args.scale64 : static_cast<double>(args.scale));
  const DropRule rule{dropout_threshold(args.dropout.probability), 1 / (1 - double{args.dropout.probability})};

  void place(int32_t first) {
    const int32_t rest = task.tile->rows - first;
    s.lanes.place(table, group, task.tile->origin, task.tile->first_row + first, rest < kTileRows ? rest : kTileRows,
                  over_keys);
    // The four panels of the lanes: what rows do not fill must be finite.
    __builtin_memset(s.lane_left, 0, sizeof(T) * 4 * static_cast<size_t>(kTileRows * head_dim));
  }

  /// The row's number in [batch, heads, queries], as lse and delta are laid out.
  int64_t statistics_at(int64_t head, int32_t position) const {
    return (task.batch * args.heads + head) * args.queries + position - header.query_begin;
  }

  /// Exponent such that P = multiplicity * 2^(score + it); a query that attends to nothing gets P = 0.
  T query_bias(int64_t at) const {
    const T lse = static_cast<const T*>(args.lse)[at];
    const T infinity = static_cast<T>(__builtin_inf());
    return lse == -infinity ? -infinity : -lse * static_cast<T>(kLog2E);
  }

  T query_delta(int64_t at) const { return static_cast<const T*>(args.delta)[at]; }

  uint32_t query_hash(int64_t head, int32_t position) const {
    return rule.threshold == 0 ? 0 : dropout_row_key(*args.dropout.seed, task.batch, head, position);
  }

  static uint32_t key_hash(int32_t position) { return static_cast<uint32_t>(position) * kKeyHash; }

  void gather(const Rows& rows, int64_t row, int64_t head, const Stretch& stretch, int column, T* to) const {
    gather_rows(to + column * head_dim, row_at<Element>(rows, task.batch, row, head), rows.strides.row * stretch.stride,
                stretch.count, head_dim);
  }

  /// S and dP of a chunk, then P and dS in their places.
  void score(int first_vector, bool masked) {
    const int lane = first_vector * kLanes<T>;
    const int vectors = s.lanes.vectors - first_vector;
    gemm<T>(s.columns.count, vectors, head_dim, {s.column_left, head_dim, 1}, {s.lane_left + lane, kTileRows},
            {s.scores + lane, kTileRows}, false);
    gemm<T>(s.columns.count, vectors, head_dim, {s.column_right, head_dim, 1}, {s.lane_right + lane, kTileRows},
            {s.gradients + lane, kTileRows}, false);
    differentiate(s, first_vector, masked, rule);
  }

  /// grad (+)= columns^T weights, [head_dim][lanes].
  void add_to_lanes(int first_vector, const T* columns, const T* weights, T* grad) {
    const int lane = first_vector * kLanes<T>;
    gemm<T>(static_cast<int>(head_dim), s.lanes.vectors - first_vector, s.columns.count, {columns, 1, head_dim},
            {weights + lane, kTileRows}, {grad + lane, kTileRows}, true);
  }

  template <typename Fill, typename Process>
  void for_chunks(Fill fill, Process process) {
    for_each_chunk(table, group, task.tile->origin, s.lanes, s.columns, args.is_causal, over_keys, fill, process);
  }
};

template <typename Element>
void backward_keys_tile(const BackwardArgs& args, const TileTask& task, const QuerySums& sums, void* scratch) {
  using T = Compute<Element>;
  auto& s = *static_cast<BackwardScratch<T>*>(scratch);
  s.lay_out(reinterpret_cast<T*>(&s + 1), args.head_dim);
  BackwardTile<Element> tile{args, task, PatternView{args.pattern}.transposed(), true, s};
  const int64_t head_dim = args.head_dim;

  // Where the chunk's query rows are summed up.
  T* rows[kChunk];
  const auto fill = [&](const Stretch& stretch, int column) {
    const int64_t head = task.head * tile.shared_by + stretch.head;
    const int64_t row = stretch.first - tile.header.query_begin;
    tile.gather(args.query, row, head, stretch, column, s.column_left);
    tile.gather(args.grad_out, row, head, stretch, column, s.column_right);
    for (int j = 0; j < stretch.count; ++j) {
      const int32_t position = stretch.first + stretch.stride * j;
      const int64_t at = tile.statistics_at(head, position);
      s.columns.bias[column + j] += tile.query_bias(at);
      s.columns.delta[column + j] = tile.query_delta(at);
      s.columns.hash[column + j] = tile.query_hash(head, position);
      if (sums.data != nullptr) {
        rows[column + j] = row_at<T>(MutableRows{sums.data, sums.strides}, task.batch,
                                     position - tile.header.query_begin, head);
      }
    }
  };
  const auto process = [&](int first_vector, bool masked) {
    tile.score(first_vector, masked);
    tile.add_to_lanes(first_vector, s.column_left, s.gradients, s.grad_left);
    tile.add_to_lanes(first_vector, s.column_right, s.scores, s.grad_right);
    if (sums.data == nullptr) {
      return;
    }
    const int lane = first_vector * kLanes<T>;
    gemm<T>(s.columns.count, static_cast<int>(tile.padded) / kLanes<T>, s.lanes.rows - lane,
            {s.gradients + lane, kTileRows, 1}, {s.key_rows + lane * tile.padded, tile.padded},
            {s.query_sum, tile.padded}, false);
    for (int c = 0; c < s.columns.count; ++c) {
      const T* from = s.query_sum + c * tile.padded;
      T* __restrict to = rows[c];
      for (int64_t d = 0; d < head_dim; ++d) {
        to[d] += from[d];
      }
    }
  };

  for (int32_t first = 0; first < task.tile->rows; first += kTileRows) {
    tile.place(first);
    __builtin_memset(s.key_rows, 0, sizeof(T) * static_cast<size_t>(kTileRows * tile.padded));
    for (int lane = 0; lane < s.lanes.rows; ++lane) {
      const int64_t row = s.lanes.position[lane] - tile.header.key_begin;
      const Element* key = row_at<Element>(args.key, task.batch, row, task.head);
      pack_lane(s.lane_left, lane, key, head_dim, static_cast<T>(tile.scale * kLog2E));
      pack_lane(s.lane_right, lane, row_at<Element>(args.value, task.batch, row, task.head), head_dim, T{1});
      for (int64_t d = 0; d < head_dim; ++d) {
        s.key_rows[lane * tile.padded + d] = widen(key[d]) * tile.scale;
      }
    }
    for (int lane = 0; lane < kTileRows; ++lane) {
      s.lanes.hash[lane] = lane < s.lanes.rows ? tile.key_hash(s.lanes.position[lane]) : 0;
    }
    tile.for_chunks(fill, process);
    for (int lane = 0; lane < s.lanes.rows; ++lane) {
      const int64_t row = s.lanes.position[lane] - tile.header.key_begin;
      unpack_lane(row_at<Element>(args.grad_key, task.batch, row, task.head), s.grad_left, lane, head_dim, tile.scale);
      unpack_lane(row_at<Element>(args.grad_value, task.batch, row, task.head), s.grad_right, lane, head_dim, T{1});
    }
  }
}

template <typename Element>
void backward_queries_tile(const BackwardArgs& args, const TileTask& task, void* scratch) {
  using T = Compute<Element>;
  auto& s = *static_cast<BackwardScratch<T>*>(scratch);
  s.lay_out(reinterpret_cast<T*>(&s + 1), args.head_dim);
  BackwardTile<Element> tile{args, task, PatternView{args.pattern}.forward(), false, s};
  const int64_t head_dim = args.head_dim;
  const int64_t kv_head = task.head / tile.shared_by;

  const auto fill = [&](const Stretch& stretch, int column) {
    const int64_t row = stretch.first - tile.header.key_begin;
    tile.gather(args.key, row, kv_head, stretch, column, s.column_left);
    tile.gather(args.value, row, kv_head, stretch, column, s.column_right);
    for (int j = 0; j < stretch.count; ++j) {
      s.columns.delta[column + j] = 0;
      s.columns.hash[column + j] = tile.key_hash(stretch.first + stretch.stride * j);
    }
  };
  const auto process = [&](int first_vector, bool masked) {
    tile.score(first_vector, masked);
    tile.add_to_lanes(first_vector, s.column_left, s.gradients, s.grad_left);
  };

  for (int32_t first = 0; first < task.tile->rows; first += kTileRows) {
    tile.place(first);
    for (int lane = 0; lane < s.lanes.rows; ++lane) {
      const int32_t position = s.lanes.position[lane];
      const int64_t row = position - tile.header.query_begin;
      pack_lane(s.lane_left, lane, row_at<Element>(args.query, task.batch, row, task.head), head_dim,
                static_cast<T>(tile.scale * kLog2E));
      pack_lane(s.lane_right, lane, row_at<Element>(args.grad_out, task.batch, row, task.head), head_dim, T{1});
      const int64_t at = tile.statistics_at(task.head, position);
      s.lanes.bias[lane] = tile.query_bias(at);
      s.lanes.delta[lane] = tile.query_delta(at);
    }
    for (int lane = 0; lane < kTileRows; ++lane) {
      s.lanes.hash[lane] = lane < s.lanes.rows ? tile.query_hash(task.head, s.lanes.position[lane]) : 0;
    }
    tile.for_chunks(fill, process);
    for (int lane = 0; lane < s.lanes.rows; ++lane) {
      const int64_t row = s.lanes.position[lane] - tile.header.query_begin;
      unpack_lane(row_at<Element>(args.grad_query, task.batch, row, task.head), s.grad_left, lane, head_dim,
                  tile.scale);
    }
  }
}

}  // namespace dilated::kernels::cpu::DILATED_ISA

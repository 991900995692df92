// Forward pass of one tile: out and lse of up to 64 query rows.
//
// Everything is transposed, so that query rows are lanes: S^T = K Q^T, a running softmax down the columns of S^T, and
// O^T += V^T P^T. Scores are in base 2: scale * log2(e) is folded into the packed queries, multiplicities are biases.
#pragma once

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/tile.h"
#include "kernels/cpu/tile_kernels.h"

namespace dilated::kernels::cpu::DILATED_ISA {

template <typename T>
struct ForwardScratch {
  Lanes<T> lanes;
  Columns<T> columns;
  alignas(64) T highest[kTileRows];  // running maximum of each row's scores, in base 2
  alignas(64) T total[kTileRows];    // running sum of 2^(score - highest)
  alignas(64) T scores[kChunk * kTileRows];
  T *queries, *out;   // [head_dim][kTileRows]
  T *keys, *values;   // [kChunk][head_dim]

  static int64_t panels(int64_t head_dim) { return (2 * kTileRows + 2 * kChunk) * head_dim; }
  void lay_out(T* at, int64_t head_dim) {
    queries = at;
    out = queries + kTileRows * head_dim;
    keys = out + kTileRows * head_dim;
    values = keys + kChunk * head_dim;
  }
};

/// Scores -> probabilities relative to the running maximum, of one vector of rows; what was summed before is rescaled.
template <typename T, bool kMasked>
inline void softmax_vector(ForwardScratch<T>& s, int lane, int64_t head_dim) {
  const Columns<T>& columns = s.columns;
  const auto order = load_as<IntVector<T>>(s.lanes.order + lane);
  const Vector<T> minus_infinity = Vector<T>{} - static_cast<T>(__builtin_inf());
  const auto score = [&](int c) {
    const Vector<T> x = load(s.scores + c * kTileRows + lane) + columns.bias[c];
    return kMasked ? (order >= columns.order[c] ? x : minus_infinity) : x;
  };
  const Vector<T> before = load(s.highest + lane);
  Vector<T> highest = before;
  for (int c = 0; c < columns.count; ++c) {
    highest = maximum<T>(score(c), highest);
  }
  store(s.highest + lane, highest);
  const Vector<T> base = highest > minus_infinity ? highest : Vector<T>{};
  Vector<T> total{};
  for (int c = 0; c < columns.count; ++c) {
    const Vector<T> p = exp2<T>(score(c) - base);
    total += p;
    store(s.scores + c * kTileRows + lane, p);
  }
  const Vector<T> rescale = exp2<T>(before - base);
  store(s.total + lane, load(s.total + lane) * rescale + total);
  for (int64_t d = 0; d < head_dim; ++d) {
    T* out = s.out + d * kTileRows + lane;
    store(out, load(out) * rescale);
  }
}

template <typename T>
inline void drop(ForwardScratch<T>& s, int first_lane, uint32_t threshold) {
  for (int lane = first_lane; lane < s.lanes.vectors * kLanes<T>; lane += kLanes<T>) {
    const auto hash = load_as<HashVector<T>>(s.lanes.hash + lane);
    for (int c = 0; c < s.columns.count; ++c) {
      T* p = s.scores + c * kTileRows + lane;
      store(p, keep_mask<T>(hash ^ s.columns.hash[c], threshold) ? load(p) : Vector<T>{});
    }
  }
}

/// Divides by the sums, rounds once and writes.
template <typename Element, typename T>
inline void write_rows(const ForwardArgs& args, const TileTask& task, const ForwardScratch<T>& s) {
  const int64_t query_begin = PatternView{args.pattern}.header().query_begin;
  T* lse = static_cast<T*>(args.lse) + (task.batch * args.heads + task.head) * args.queries - query_begin;
  const T kept = static_cast<T>(1) - static_cast<T>(args.dropout.probability);
  for (int lane = 0; lane < s.lanes.rows; ++lane) {
    const int64_t position = s.lanes.position[lane];
    const T total = s.total[lane];
    const bool empty = total == 0;
    lse[position] = empty ? -static_cast<T>(__builtin_inf())
                          : s.highest[lane] * static_cast<T>(kLn2) + static_cast<T>(__builtin_log(total));
    Element* out = row_at<Element>(args.out, task.batch, position - query_begin, task.head);
    unpack_lane(out, s.out, lane, args.head_dim, empty ? T{0} : 1 / (total * kept));
  }
}

template <typename Element>
void forward_tile(const ForwardArgs& args, const TileTask& task, void* scratch) {
  using T = Compute<Element>;
  const PatternView pattern{args.pattern};
  const Header& header = pattern.header();
  const TableView table = pattern.forward();
  const Group& group = table.groups()[task.tile->group];
  const int64_t head_dim = args.head_dim;
  const int64_t kv_head = task.head / (args.heads / args.kv_heads);
  const uint32_t threshold = dropout_threshold(args.dropout.probability);
  auto& s = *static_cast<ForwardScratch<T>*>(scratch);
  s.lay_out(reinterpret_cast<T*>(&s + 1), head_dim);
  const T factor = (sizeof(T) == 8 ? args.scale64 : args.scale) * kLog2E;

  const auto fill = [&](const Stretch& stretch, int column) {
    const int64_t row = stretch.first - header.key_begin;
    const auto gather = [&](const Rows& rows, T* to) {
      gather_rows(to + column * head_dim, row_at<Element>(rows, task.batch, row, kv_head),
                  rows.strides.row * stretch.stride, stretch.count, head_dim);
    };
    gather(args.key, s.keys);
    gather(args.value, s.values);
    if (threshold != 0) {
      for (int j = 0; j < stretch.count; ++j) {
        s.columns.hash[column + j] = static_cast<uint32_t>(stretch.first + stretch.stride * j) * kKeyHash;
      }
    }
  };
  const auto process = [&](int first_vector, bool masked) {
    const int lane = first_vector * kLanes<T>;
    const int vectors = s.lanes.vectors - first_vector;
    gemm<T>(s.columns.count, vectors, head_dim, {s.keys, head_dim, 1}, {s.queries + lane, kTileRows},
            {s.scores + lane, kTileRows}, false);
    for (int v = first_vector; v < s.lanes.vectors; ++v) {
      masked ? softmax_vector<T, true>(s, v * kLanes<T>, head_dim)
             : softmax_vector<T, false>(s, v * kLanes<T>, head_dim);
    }
    if (threshold != 0) {
      drop(s, lane, threshold);
    }
    gemm<T>(static_cast<int>(head_dim), vectors, s.columns.count, {s.values, 1, head_dim},
            {s.scores + lane, kTileRows}, {s.out + lane, kTileRows}, true);
  };

  for (int32_t first = 0; first < task.tile->rows; first += kTileRows) {
    const int32_t rest = task.tile->rows - first;
    s.lanes.place(table, group, task.tile->origin, task.tile->first_row + first, rest < kTileRows ? rest : kTileRows,
                  false);
    __builtin_memset(s.queries, 0, sizeof(T) * 2 * kTileRows * head_dim);  // and out
    for (int lane = 0; lane < kTileRows; ++lane) {
      s.highest[lane] = group.zero_keys != 0 ? T{0} : -static_cast<T>(__builtin_inf());
      s.total[lane] = static_cast<T>(group.zero_keys);
    }
    for (int lane = 0; lane < s.lanes.rows; ++lane) {
      const int64_t position = s.lanes.position[lane];
      pack_lane(s.queries, lane, row_at<Element>(args.query, task.batch, position - header.query_begin, task.head),
                head_dim, factor);
    }
    if (threshold != 0) {
      for (int lane = 0; lane < kTileRows; ++lane) {
        s.lanes.hash[lane] = dropout_row_key(*args.dropout.seed, task.batch, task.head, s.lanes.position[lane]);
      }
    }
    for_each_chunk(table, group, task.tile->origin, s.lanes, s.columns, args.is_causal, false, fill, process);
    write_rows<Element>(args, task, s);
  }
}

}  // namespace dilated::kernels::cpu::DILATED_ISA

// One warp of the backward kernel in attention_backward.cuh: its products, and what lies in
// registers and shared memory.
//
// S^T = K Q^T, P^T = multiplicity * exp(S^T - lse), dP^T = V dO^T, dS^T = P^T (dP^T - delta). A
// warp computes scores of 32 keys by some queries. Up to width 64 it goes on with them alone:
// packed accumulators are operands of the next products. Wider rows are split over kParts warps,
// each of which computes the scores of its share of the queries and accumulates its share of the
// columns; P^T and dS^T then meet in shared memory. dS^T always does, since grad_query sums over
// keys.
//
// One class, since its steps share the accumulators.
#pragma once

#include "kernels/cuda/portable/backward_call.cuh"
#include "kernels/cuda/portable/shapes.h"
#include "kernels/cuda/primitives/float_row.cuh"
#include "kernels/cuda/primitives/reduce_add.cuh"
#include "kernels/cuda/primitives/score.cuh"
#include "kernels/cuda/primitives/warp_tile.cuh"

namespace dilated::kernels::cuda::portable {

template <typename Element_, int kWidth_, int kKeys_>
struct BackwardShape {
  using Element = Element_;
  static constexpr int kWidth = kWidth_, kKeys = kKeys_;  // head_dim padded, and rows of a tile
  static constexpr BackwardTile kTile{kWidth, kKeys};
  static constexpr int kQueries = kTile.queries();
  static constexpr int kParts = kTile.parts();
  static constexpr int kPartWidth = kWidth / kParts;
  static constexpr int kPassQueries =
      kParts == 1 ? 32 : kQueries / kParts;  // of one block of scores
  static constexpr int kPasses = kParts == 1 ? kQueries / 32 : 1;
  static constexpr int kWarpKeys = kKeys < 32 ? kKeys : 32;
  static constexpr int kKeyWarps = kKeys / kWarpKeys;
  static constexpr int kWarps = kKeyWarps * kParts;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kBlocks = kTile.blocks();
  // grad_query of a tile: warps in rows by warps in columns.
  static constexpr int kRowWarps = kWarps == 1 ? 1 : kWidth / ((kWarps + 1) / 2) % 16 == 0 ? 2 : 4;
  static constexpr int kSumRows = kQueries / kRowWarps, kSumWidth = kWidth / (kWarps / kRowWarps);
  using Keys = RowTile<kWidth, kKeys, kThreads>;
  using Queries = RowTile<kWidth, kQueries, kThreads>;
  using Layout = typename Keys::Layout;
  using Weights = Swizzle<kQueries / 8>;  // P^T and dS^T: [kKeys][kQueries]
  static constexpr int kWeightBytes = kKeys * kQueries * 2;
  static_assert(kPartWidth % 16 == 0 && kSumRows % 16 == 0 && kSumWidth % 16 == 0);
};

/// Shared memory of a block, in front of `stages` times {query tile, grad_out tile}. Tiles are
/// aligned to 128 bytes.
template <typename Shape>
struct BackwardMemory {
  alignas(128) unsigned char key[Shape::Keys::kBytes];     // in the end grad_key
  alignas(128) unsigned char value[Shape::Keys::kBytes];   // in the end grad_value
  alignas(128) unsigned char scores[Shape::kWeightBytes];  // dS^T
  alignas(128) unsigned char weights[Shape::kParts > 1 ? Shape::kWeightBytes : 128];  // P^T
  QueryColumns<Shape::kQueries> columns[3];
  RowTileList<Shape::kKeys> keys;
  BackwardItem item;
  alignas(16) unsigned char cursor[sizeof(ColumnCursor)];
  int32_t is_done;
  alignas(128) unsigned char stages[];

  static constexpr int kStageBytes = 2 * Shape::Queries::kBytes;
  __device__ unsigned char* query(int stage) { return stages + stage * kStageBytes; }
  __device__ unsigned char* grad_out(int stage) { return query(stage) + Shape::Queries::kBytes; }
};

/// One warp's part of a tile. Key row r = 2 * m + half of a thread is row 16 * m + 8 * half + lane
/// / 4 of the warp's.
template <typename Shape>
class BackwardWarp {
 public:
  using Element = typename Shape::Element;
  using Layout = typename Shape::Layout;
  using Weights = typename Shape::Weights;
  using Columns = QueryColumns<Shape::kQueries>;
  static constexpr int kTiles = Shape::kWarpKeys / 16, kQueryTiles = Shape::kPassQueries / 8,
                       kWidthTiles = Shape::kPartWidth / 8;

  __device__ BackwardWarp(const BackwardCall& call, BackwardMemory<Shape>& memory)
      : call_(call), memory_(memory) {
    set_zero(grad_key_);
    set_zero(grad_value_);
  }

  /// Scores of the tile; their share of grad_key and grad_value, and dS^T, if kParts == 1, or both
  /// sets of weights.
  __device__ void weigh(int stage, const Columns& columns) {
    const uint32_t query = shared_address(memory_.query(stage));
    const uint32_t grad_out = shared_address(memory_.grad_out(stage));
#pragma unroll 1
    for (int pass = 0; pass < Shape::kPasses; ++pass) {
      const int first =
          Shape::kParts == 1 ? pass * Shape::kPassQueries : part() * Shape::kPassQueries;
      const uint32_t queries = query + first * Layout::kRowBytes;
      const uint32_t gradients = grad_out + first * Layout::kRowBytes;
      const int keys = left_offset<Layout>(first_key(), lane()),
                columns_at = right_offset<Layout>(lane());
      Scores weights, scores;
      multiply_rows<Element, Layout>(weights, shared_address(memory_.key) + keys,
                                     queries + columns_at);
      multiply_rows<Element, Layout>(scores, shared_address(memory_.value) + keys,
                                     gradients + columns_at);
      differentiate(weights, scores, columns, first);
      store(memory_.scores, scores, first);
      if constexpr (Shape::kParts == 1) {
        const int rows = left_offset<Layout>(0, lane());
        accumulate<Element, Layout>(grad_value_, weights, gradients + rows);
        accumulate<Element, Layout>(grad_key_, scores, queries + rows);
      } else {
        store(memory_.weights, weights, first);
      }
    }
  }

  /// Once all warps have stored their weights.
  __device__ void accumulate_part(int stage) {
    accumulate_stored(grad_value_, memory_.weights, memory_.grad_out(stage));
    accumulate_stored(grad_key_, memory_.scores, memory_.query(stage));
  }

  __device__ void add_grad_query(const Columns& columns);
  __device__ void finish();

 private:
  using Scores = Accumulators<kTiles, kQueryTiles>;
  using Gradient = Accumulators<kTiles, kWidthTiles>;

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int part() { return threadIdx.x / 32 / Shape::kKeyWarps; }
  __device__ static int first_key() {
    return threadIdx.x / 32 % Shape::kKeyWarps * Shape::kWarpKeys;
  }

  /// weights: scores to P^T, what dropout leaves of it; scores: dP^T to dS^T.
  __device__ void differentiate(Scores& weights, Scores& scores, const Columns& columns,
                                int first) {
    const bool is_masked = columns.is_masked;
    const bool drops = call_.args.dropout.probability > 0;
    const float scale = call_.args.scale;
    for_each_pair(weights, [&](float* weight, int, int n) {
      const float2 bias = pair_in(columns.bias + first, n), lse = pair_in(columns.lse + first, n);
      weight[0] = softmax_weight(logit_of(weight[0], scale, bias.x), lse.x);
      weight[1] = softmax_weight(logit_of(weight[1], scale, bias.y), lse.y);
    });
    if (is_masked) {
      mask(weights, columns, first);
    }
    if (drops) {
      drop(scores, columns, first);
    }
    for_each_pair(scores, [&](float* score, int r, int n) {
      const float2 delta = pair_in(columns.delta + first, n);
      const float* weight = pair_of(weights, r, n);
      score[0] = score_gradient(weight[0], score[0], delta.x);
      score[1] = score_gradient(weight[1], score[1], delta.y);
    });
    if (drops) {
      drop(weights, columns, first);
    }
  }

  /// Weights of queries that the key does not see, and of key rows that do not exist, become zero.
  __device__ void mask(Scores& weights, const Columns& columns, int first) const {
    const bool is_causal = call_.args.is_causal;
    const auto exists = [&](int r) { return row_index(r) < memory_.keys.count; };
    if (memory_.keys.windows == nullptr) {
      mask(weights, columns, first, [&](int r) {
        const int32_t lowest = is_causal ? memory_.keys.position[row_index(r)] : INT_MIN;
        return From{exists(r) ? lowest : INT_MAX};
      });
    } else {
      mask(weights, columns, first, [&](int r) {
        const Window window = window_of(memory_.keys, row_index(r), is_causal, /*over_keys=*/true);
        return Window{window.first, exists(r) ? window.last : INT_MIN};
      });
    }
  }

  template <typename WindowOfRow>
  __device__ static void mask(Scores& weights, const Columns& columns, int first,
                              const WindowOfRow& window_of_row) {
#pragma unroll
    for (int r = 0; r < 2 * kTiles; ++r) {
      const auto window = window_of_row(r);
      for_each_pair_of_row(weights, r, [&](float* weight, int n) {
        const int2 position = pair_in(columns.position + first, n);
        weight[0] = masked_weight(weight[0], window, position.x);
        weight[1] = masked_weight(weight[1], window, position.y);
      });
    }
  }

  __device__ void drop(Scores& values, const Columns& columns, int first) {
    const uint32_t threshold = dropout_threshold(call_.args.dropout.probability);
    const float factor = 1 / (1 - call_.args.dropout.probability);
    for_each_pair(values, [&](float* value, int r, int n) {
      const uint2 keys = pair_in(columns.dropout_key + first, n);
      const int32_t position = memory_.keys.position[row_index(r)];
      value[0] = dropout_keeps(keys.x, position, threshold) ? value[0] * factor : 0;
      value[1] = dropout_keeps(keys.y, position, threshold) ? value[1] * factor : 0;
    });
  }

  /// Writes the warp's block of weights at column `first` of a [kKeys][kQueries] tile.
  __device__ static void store(unsigned char* tile, const Scores& values, int first) {
    const int at = Weights::offset(row_index(0), 0);
    for_each_pair(values, [&](const float* pair, int r, int n) {
      unsigned char* to = tile + (at ^ ((first / 8 + n) * 16)) + lane() % 4 * 4;
      *reinterpret_cast<uint32_t*>(to + r * 8 * Weights::kRowBytes) =
          pack<Element>(pair[0], pair[1]);
    });
  }

  /// gradient += weights rows: the warp's rows of the weights in shared memory, its part of the
  /// columns.
  __device__ static void accumulate_stored(Gradient& gradient, const unsigned char* weights,
                                           const unsigned char* rows) {
    const uint32_t left = shared_address(weights) + left_offset<Weights>(first_key(), lane());
    const uint32_t right = shared_address(rows) + left_offset<Layout>(0, lane());
#pragma unroll
    for (int step = 0; step < Shape::kQueries / 16; ++step) {
      uint32_t a[kTiles][4];
      load_left<Weights>(a, left, step);
      accumulate_step<Element, Layout>(gradient, a, right, step, part() * (Shape::kPartWidth / 16));
    }
  }

  __device__ void write_partial(const MutableRows& out, const Gradient& gradient,
                                float factor) const;

  __device__ static int row_index(int r) { return first_key() + r * 8 + lane() / 4; }

  const BackwardCall& call_;
  BackwardMemory<Shape>& memory_;
  Gradient grad_key_, grad_value_;
};

/// dS K of the tile, its rows over the block's warps, added to the sums in memory.
template <typename Shape>
__device__ void BackwardWarp<Shape>::add_grad_query(const Columns& columns) {
  constexpr int kRowTiles = Shape::kSumRows / 16, kColumnTiles = Shape::kSumWidth / 8;
  const int warp = threadIdx.x / 32;
  const int first_row = warp % Shape::kRowWarps * Shape::kSumRows;
  const int first_pair = warp / Shape::kRowWarps * (Shape::kSumWidth / 16);
  const uint32_t scores =
      shared_address(memory_.scores) +
      Weights::offset(lane() % 8 + lane() / 16 * 8, first_row / 8 + lane() / 8 % 2);
  const uint32_t keys = shared_address(memory_.key) + left_offset<Layout>(0, lane());
  Accumulators<kRowTiles, kColumnTiles> sums;
  set_zero(sums);
#pragma unroll
  for (int step = 0; step < Shape::kKeys / 16; ++step) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      load_matrices_transposed(a[m], (scores ^ (m * 32)) + step * 16 * Weights::kRowBytes);
    }
    accumulate_step<Element, Layout>(sums, a, keys, step, first_pair);
  }
#pragma unroll
  for (int r = 0; r < 2 * kRowTiles; ++r) {
    const int column = first_pair * 16 + lane() % 4 * 4;
    float* to = call_.grad_query.row(columns.row[first_row + r * 8 + lane() / 4]) + column;
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      const float *low = pair_of(sums, r, n), *high = pair_of(sums, r, n + 1);
      if ((first_pair + n / 2) * 16 < call_.grad_query.width) {
        reduce_add_4(to + n * 8, {low[0], low[1], high[0], high[1]});
      }
    }
  }
}

/// The warp's part of the rows in float32, as they are.
template <typename Shape>
__device__ void BackwardWarp<Shape>::write_partial(const MutableRows& out, const Gradient& gradient,
                                                   float factor) const {
  const BackwardItem& item = memory_.item;
  const int32_t first_column = part() * Shape::kPartWidth;
  auto* origin = row_at<float>(out, item.work.batch, 0, item.work.head) + first_column;
#pragma unroll
  for (int r = 0; r < 2 * kTiles; ++r) {
    if (row_index(r) < memory_.keys.count) {
      const int64_t row = memory_.keys.position[row_index(r)] + item.work.tile.row_shift;
      store_row(gradient[r / 2], r % 2, origin + row * out.strides.row,
                static_cast<int32_t>(call_.args.head_dim) - first_column, out.is_aligned, factor);
    }
  }
}

/// A gradient's rows from shared memory to the tensor, by all threads of the block.
template <typename Shape>
__device__ void write_keys(const BackwardMemory<Shape>& memory, const unsigned char* tile,
                           const MutableRows& out, int32_t head_dim) {
  const BackwardItem& item = memory.item;
  auto* origin = row_at<uint16_t>(out, item.work.batch, 0, item.work.head);
  write_rows<typename Shape::Layout, Shape::Keys::kLanes, Shape::kThreads>(
      tile, 0, memory.keys.count, threadIdx.x, head_dim, out.is_aligned, [&](int row) {
        return origin + (memory.keys.position[row] + item.work.tile.row_shift) * out.strides.row;
      });
}

/// Writes grad_key and grad_value, over the tiles that the block no longer needs.
template <typename Shape>
__device__ void BackwardWarp<Shape>::finish() {
  const BackwardArgs& args = call_.args;
  if (args.is_partial) {
    write_partial(args.grad_key, grad_key_, args.scale);
    write_partial(args.grad_value, grad_value_, 1);
    return;
  }
  __syncthreads();
  const int first_chunk = part() * kWidthTiles;
  store_rounded<Element, Layout>(memory_.key, first_key(), first_chunk, grad_key_, args.scale,
                                 lane());
  store_rounded<Element, Layout>(memory_.value, first_key(), first_chunk, grad_value_, 1, lane());
  __syncthreads();
  const int32_t head_dim = static_cast<int32_t>(args.head_dim);
  write_keys(memory_, memory_.key, args.grad_key, head_dim);
  write_keys(memory_, memory_.value, args.grad_value, head_dim);
}

}  // namespace dilated::kernels::cuda::portable

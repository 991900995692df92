// grad_query by blocks that keep their queries: no sums over blocks, so the same bits on every run.
//
// Two products more than in attention_backward.cuh, which then leaves grad_query alone. A block
// takes 64 query rows, 16 a warp, and walks their list of keys as the forward pass does; a warp's
// dS stays in registers.
#pragma once

#include "kernels/cuda/portable/backward_call.cuh"
#include "kernels/cuda/primitives/async_copy.cuh"
#include "kernels/cuda/primitives/float_row.cuh"
#include "kernels/cuda/primitives/lists.cuh"
#include "kernels/cuda/primitives/numerics.cuh"
#include "kernels/cuda/primitives/score.cuh"
#include "kernels/cuda/primitives/warp_tile.cuh"

namespace dilated::kernels::cuda::portable {

template <typename Element_, int kWidth_>
struct BackwardQueryShape {
  using Element = Element_;
  static constexpr int kWidth = kWidth_, kWarps = 4, kThreads = kWarps * 32, kRows = kWarps * 16;
  static constexpr int kKeys = kWidth > 128 ? 32 : 64;
  using Keys = RowTile<kWidth, kKeys, kThreads>;
  using Queries = RowTile<kWidth, kRows, kThreads>;
  using Layout = typename Keys::Layout;
};

/// Shared memory of a block. Tiles are aligned to 128 bytes.
template <typename Shape>
struct BackwardQueryMemory {
  alignas(128) unsigned char query[Shape::Queries::kBytes];  // in the end grad_query
  alignas(128) unsigned char grad_out[Shape::Queries::kBytes];
  alignas(128) unsigned char key[2][Shape::Keys::kBytes];
  alignas(128) unsigned char value[2][Shape::Keys::kBytes];
  KeyTile<Shape::kKeys> keys[3];
  RowTileList<Shape::kRows> rows;
};

/// One warp's 16 rows. Row r = 0, 1 of a thread is row 8 * r + lane / 4.
template <typename Shape>
class BackwardQueryWarp {
 public:
  using Element = typename Shape::Element;
  using Layout = typename Shape::Layout;
  using Keys = KeyTile<Shape::kKeys>;
  static constexpr int kKeyTiles = Shape::kKeys / 8, kWidthTiles = Shape::kWidth / 8;

  __device__ BackwardQueryWarp(const BackwardArgs& args, const WorkItem& work,
                               BackwardQueryMemory<Shape>& memory)
      : args_(args), work_(work), memory_(memory) {
    const int64_t head_row =
        (work.batch * args.heads + work.head) * args.queries + work.tile.row_shift;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = head_row + position(r);
      lse_[r] = weight_lse(static_cast<const float*>(args.lse)[row]);
      delta_[r] = static_cast<const float*>(args.delta)[row];
    }
    set_zero(gradient_);
  }

  __device__ void attend(int stage, const Keys& keys) {
    const uint32_t key = shared_address(memory_.key[stage]);
    const uint32_t value = shared_address(memory_.value[stage]);
    const int rows = left_offset<Layout>(first_row(), lane()),
              columns = right_offset<Layout>(lane());
    Scores weights, scores;
    multiply_rows<Element, Layout>(weights, shared_address(memory_.query) + rows, key + columns);
    multiply_rows<Element, Layout>(scores, shared_address(memory_.grad_out) + rows,
                                   value + columns);
    differentiate(weights, scores, keys);
    accumulate<Element, Layout>(gradient_, scores, key + left_offset<Layout>(0, lane()));
  }

  __device__ void finish();

 private:
  using Scores = Accumulators<1, kKeyTiles>;

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int first_row() { return threadIdx.x / 32 * 16; }
  __device__ static int row_index(int r) { return first_row() + r * 8 + lane() / 4; }

  __device__ int32_t position(int r) const { return memory_.rows.position[row_index(r)]; }

  /// scores: from dP to dS; weights are the scores of the forward pass.
  __device__ void differentiate(const Scores& weights, Scores& scores, const Keys& keys) {
    const float probability = args_.dropout.probability;
    const uint32_t threshold = dropout_threshold(probability);
    const float factor = 1 / (1 - probability);
    Window windows[2];
    uint32_t dropout_keys[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      windows[r] = window_of(memory_.rows, row_index(r), args_.is_causal, /*over_keys=*/false);
      if (probability > 0) {
        dropout_keys[r] = row_dropout_key(args_, work_, position(r));
      }
    }
    const auto gradient_of = [&](float score, float gradient, float bias, int32_t key, int r) {
      float weight = softmax_weight(logit_of(score, args_.scale, bias), lse_[r]);
      if (keys.is_masked) {
        weight = masked_weight(weight, windows[r], key);
      }
      if (probability > 0) {
        gradient = dropout_keeps(dropout_keys[r], key, threshold) ? gradient * factor : 0;
      }
      return score_gradient(weight, gradient, delta_[r]);
    };
    for_each_pair(scores, [&](float* gradient, int r, int n) {
      const float* score = pair_of(weights, r, n);
      const float2 bias = pair_in(keys.bias, n);
      const int2 key = pair_in(keys.position, n);
      gradient[0] = gradient_of(score[0], gradient[0], bias.x, key.x, r);
      gradient[1] = gradient_of(score[1], gradient[1], bias.y, key.y, r);
    });
  }

  const BackwardArgs& args_;
  const WorkItem& work_;
  BackwardQueryMemory<Shape>& memory_;
  Accumulators<1, kWidthTiles> gradient_;
  float lse_[2], delta_[2];
};

/// 16-bit rows go through the query tile's memory, of which each warp uses its own rows.
template <typename Shape>
__device__ void BackwardQueryWarp<Shape>::finish() {
  const WorkItem& work = work_;
  const MutableRows& out = args_.grad_query;
  const float scale = args_.scale;
  const int32_t head_dim = static_cast<int32_t>(args_.head_dim);
  const int32_t rows = min(work.group.rows - work.tile.first_row, Shape::kRows);
  if (args_.is_partial) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row_index(r) < rows) {
        const int64_t row = position(r) + work.tile.row_shift;
        store_row(gradient_[0], r, row_at<float>(out, work.batch, row, work.head), head_dim,
                  out.is_aligned, scale);
      }
    }
    return;
  }
  __syncwarp();
  store_rounded<Element, Layout>(memory_.query, first_row(), 0, gradient_, scale, lane());
  __syncwarp();
  write_rows<Layout, Shape::Queries::kLanes, 32>(
      memory_.query, first_row(), min(rows, first_row() + 16), lane(), head_dim, out.is_aligned,
      [&](int row) {
        const int64_t at = memory_.rows.position[row] + work.tile.row_shift;
        return row_at<uint16_t>(out, work.batch, at, work.head);
      });
}

template <typename Shape>
__device__ void backward_query_tile(const BackwardArgs& args, const PatternView& pattern,
                                    const WorkItem& work, BackwardQueryMemory<Shape>& memory) {
  const TableView table = pattern.forward();
  const KeyList keys = begin_rows(table, work, args, memory.rows);
  const int32_t tiles = (keys.columns + Shape::kKeys - 1) / Shape::kKeys;
  ColumnCursor cursor = cursor_of(table, work, keys.windows.some);
  const auto list = [&](int32_t tile) {
    if (threadIdx.x < 32 && tile < tiles) {
      read_keys(cursor, tile * Shape::kKeys, keys.windows.all, memory.keys[tile % 3]);
    }
  };
  const int32_t key_head = work.head / static_cast<int32_t>(args.heads / args.kv_heads);
  const auto source = [&](const Rows& rows, int32_t head, int32_t first) {
    return row_source(row_at<uint16_t>(rows, work.batch, first, head), rows, args.head_dim);
  };
  const RowSource key = source(args.key, key_head, 0);
  const RowSource value = source(args.value, key_head, 0);
  const auto copy = [&](int32_t tile) {
    if (tile < tiles) {
      Shape::Keys::copy(
          {shared_address(memory.key[tile % 2]), shared_address(memory.value[tile % 2])},
          memory.keys[tile % 3].place, {key, value});
    }
    commit_copies();
  };
  list(0);
  list(1);
  Shape::Queries::copy({shared_address(memory.query), shared_address(memory.grad_out)},
                       memory.rows.position,
                       {source(args.query, work.head, work.tile.row_shift),
                        source(args.grad_out, work.head, work.tile.row_shift)});
  __syncthreads();
  copy(0);
  BackwardQueryWarp<Shape> warp(args, work, memory);
#pragma unroll 1
  for (int32_t tile = 0; tile < tiles; ++tile) {
    wait_for_copies<0>();
    __syncthreads();
    copy(tile + 1);
    list(tile + 2);
    warp.attend(tile % 2, memory.keys[tile % 3]);
  }
  wait_for_copies<0>();
  __syncthreads();  // rows without keys come here while other threads still copy their queries
  warp.finish();
}

template <typename Element, int kWidth>
__global__ void __launch_bounds__(BackwardQueryShape<Element, kWidth>::kThreads, 1)
    backward_query_kernel(const __grid_constant__ BackwardArgs args) {
  using Shape = BackwardQueryShape<Element, kWidth>;
  extern __shared__ __align__(128) unsigned char bytes[];
  auto& memory = *reinterpret_cast<BackwardQueryMemory<Shape>*>(bytes);
  const PatternView pattern{args.pattern};
  const int64_t items = count_work(pattern.forward(), args.batch);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    WorkItem work;
    // A block may take several of the pattern's tiles at once: the rest of the group's rows come
    // with the first.
    if (find_work(pattern.forward(), item, args.batch, work) &&
        work.tile.first_row % Shape::kRows == 0) {
      backward_query_tile<Shape>(args, pattern, work, memory);
      __syncthreads();
    }
  }
}

}  // namespace dilated::kernels::cuda::portable

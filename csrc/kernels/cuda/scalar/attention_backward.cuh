// Backward pass in float32 arithmetic without tensor cores: float32 tensors, and 16-bit ones where
// the tiles of attention_backward.cuh do not fit in shared memory.
//
// One kernel in two directions, without atomics, so the same bits on every run. Rows stay, columns
// are walked 32 at a time. Transposed, rows are keys and columns queries, and a block computes
// grad_key and grad_value; forward, rows are queries and columns keys, and it computes grad_query:
//
//   scores = first_row . first_column, weight gradients = second_row . second_column
//   transposed: first = key and query, second = value and grad_out;  forward: the same, rows and
//   columns exchanged
#pragma once

#include "kernels/attention.h"
#include "kernels/cuda/primitives/lists.cuh"
#include "kernels/cuda/primitives/numerics.cuh"
#include "kernels/cuda/primitives/score.cuh"
#include "kernels/cuda/primitives/work.cuh"
#include "kernels/cuda/scalar/rows.cuh"
#include "kernels/cuda/scalar/shapes.h"
#include "kernels/dropout.h"

namespace dilated::kernels::cuda::scalar {

template <int kWidth>
struct ScalarShape {
  static constexpr BackwardTile kTile{kWidth};
  static constexpr int kThreads = 128, kColumns = kTile.kColumns;
  static constexpr int kBlocks = kWidth > 64 ? 2 : 3;  // a multiprocessor has registers for
  static constexpr int kRows = kTile.rows();
  static constexpr int kPitch = pitch(kWidth);
  static constexpr int kRowsPerWarp = kRows / 4;
  static constexpr int kVectors = kWidth / 4;
  static constexpr int kOutputs =
      kRows * kVectors / kThreads;  // float4 of a gradient that a thread sums
};

/// What pairs need of their query, which is a row or, transposed, a column.
struct QueryList {
  float lse[32];  // as softmax_weight() takes it
  float delta[32];
  uint32_t dropout_key[32];
};

template <int kWidth>
struct ScalarMemory {
  using Shape = ScalarShape<kWidth>;
  float first_row[Shape::kRows][Shape::kPitch], second_row[Shape::kRows][Shape::kPitch];
  float first_column[Shape::kColumns][Shape::kPitch], second_column[Shape::kColumns][Shape::kPitch];
  float weight[Shape::kRows][Shape::kColumns], score[Shape::kRows][Shape::kColumns];
  KeyTile<Shape::kColumns> columns;
  RowTileList<Shape::kRows> rows;
  QueryList queries;
  int32_t head[Shape::kColumns];  // of columns
  ColumnCursor cursor;            // warp 0's, here rather than in registers
};

template <typename Element, int kWidth, bool kTransposed>
class ScalarBackward {
 public:
  using Shape = ScalarShape<kWidth>;

  __device__ ScalarBackward(const BackwardArgs& args, const TableView& table, const WorkItem& work,
                            ScalarMemory<kWidth>& memory)
      : args_(args), table_(table), work_(work), memory_(memory) {}

  /// The tile's first kRows rows, or all of them.
  __device__ void run() {
    const KeyList keys = begin_rows(table_, work_, args_, memory_.rows, kTransposed);
    if (!kTransposed && threadIdx.x < 32) {
      const int32_t position = memory_.rows.position[threadIdx.x];
      list_query(position, position + work_.tile.row_shift, work_.head);
    }
    load_rows<Shape::kRows>(memory_.first_row, memory_.second_row, kTransposed, [&](int row) {
      return Spot{memory_.rows.position[row] + work_.tile.row_shift, work_.head};
    });
    if (threadIdx.x < 32) {
      memory_.cursor = cursor_of(table_, work_, keys.windows.some);
      __syncwarp();
    }
    const auto list = [&](int32_t column) {
      if (threadIdx.x < 32 && column < keys.columns) {
        list_tile(column, keys.windows.all);
      }
    };
    list(0);
    for (int32_t column = 0; column < keys.columns; column += Shape::kColumns) {
      __syncthreads();
      load_rows<Shape::kColumns>(
          memory_.first_column, memory_.second_column, !kTransposed,
          [&](int at) { return Spot{memory_.columns.place[at], memory_.head[at]}; });
      __syncthreads();
      weigh();
      __syncthreads();
      list(column + Shape::kColumns);  // the other warps are already adding up
      accumulate();
    }
    write(kTransposed ? args_.grad_key : args_.grad_query, first_, args_.scale);
    if (kTransposed) {
      write(args_.grad_value, second_, 1);
    }
    __syncthreads();
  }

 private:
  /// Where a row or column lies in its tensor.
  struct Spot {
    int32_t place, head;
  };

  /// One warp. Transposed, work_.head is a KV head and columns name a head of its group; forward, a
  /// query head.
  __device__ void list_tile(int32_t first, const Window& all) {
    Column column[1];
    const bool one_run = memory_.cursor.read(first, column);
    list_columns(column, one_run, all, memory_.columns);
    const int32_t group = static_cast<int32_t>(args_.heads / args_.kv_heads);
    const int32_t head = kTransposed ? work_.head * group + static_cast<int32_t>(column[0].head())
                                     : work_.head / group;
    memory_.head[threadIdx.x] = head;
    if (kTransposed) {
      list_query(column[0].position, column[0].place, head);
    }
  }

  /// One lane's query.
  __device__ void list_query(int32_t position, int32_t place, int32_t head) {
    const int at = threadIdx.x;
    const int64_t row =
        (static_cast<int64_t>(work_.batch) * args_.heads + head) * args_.queries + place;
    memory_.queries.lse[at] = weight_lse(static_cast<const float*>(args_.lse)[row]);
    memory_.queries.delta[at] = static_cast<const float*>(args_.delta)[row];
    if (args_.dropout.probability > 0) {
      memory_.queries.dropout_key[at] =
          dropout_row_key(__ldg(args_.dropout.seed), work_.entry(), head, position);
    }
  }

  template <int kCount, typename SpotOf>
  __device__ void load_rows(float (&first)[kCount][Shape::kPitch],
                            float (&second)[kCount][Shape::kPitch], bool is_key,
                            const SpotOf& spot_of) {
    const int32_t head_dim = static_cast<int32_t>(args_.head_dim);
    const auto copy = [&](float (&tile)[kCount][Shape::kPitch], const Rows& source) {
      const auto row = [&](int at) {
        const Spot spot = spot_of(at);
        return row_at<Element>(source, work_.batch, spot.place, spot.head);
      };
      copy_rows<Shape::kThreads, Element>(tile, row, head_dim, source.is_aligned);
    };
    copy(first, is_key ? args_.key : args_.query);
    copy(second, is_key ? args_.value : args_.grad_out);
    wait_for_copies<0>();
  }

  /// One column a lane, kRowsPerWarp rows a warp.
  __device__ void weigh() {
    const int column = threadIdx.x % 32;
    const int first = threadIdx.x / 32 * Shape::kRowsPerWarp;
    float scores[Shape::kRowsPerWarp] = {}, gradients[Shape::kRowsPerWarp] = {};
#pragma unroll 4
    for (int d = 0; d < kWidth; d += 4) {
      const float4 a = *reinterpret_cast<const float4*>(&memory_.first_column[column][d]);
      const float4 b = *reinterpret_cast<const float4*>(&memory_.second_column[column][d]);
#pragma unroll
      for (int r = 0; r < Shape::kRowsPerWarp; ++r) {
        scores[r] =
            dot(a, *reinterpret_cast<const float4*>(&memory_.first_row[first + r][d]), scores[r]);
        gradients[r] = dot(b, *reinterpret_cast<const float4*>(&memory_.second_row[first + r][d]),
                           gradients[r]);
      }
    }
    differentiate(first, column, scores, gradients);
  }

  /// Scores and gradients of the weights become weights and gradients of the scores, in shared
  /// memory. What rows don't see is looked at only in tiles that have any.
  __device__ void differentiate(int first, int column, float (&scores)[Shape::kRowsPerWarp],
                                const float (&gradients)[Shape::kRowsPerWarp]) {
    const QueryList& queries = memory_.queries;
    const int32_t column_position = memory_.columns.position[column];
    const float bias = memory_.columns.bias[column];
    const auto query = [&](int r) { return kTransposed ? column : first + r; };
#pragma unroll
    for (int r = 0; r < Shape::kRowsPerWarp; ++r) {
      scores[r] = softmax_weight(logit_of(scores[r], args_.scale, bias), queries.lse[query(r)]);
    }
    if (memory_.columns.is_masked) {
#pragma unroll
      for (int r = 0; r < Shape::kRowsPerWarp; ++r) {
        const Window window = window_of(memory_.rows, first + r, args_.is_causal, kTransposed);
        scores[r] = masked_weight(scores[r], window, column_position);
      }
    }
    float factors[Shape::kRowsPerWarp];
#pragma unroll
    for (int r = 0; r < Shape::kRowsPerWarp; ++r) {
      factors[r] = 1;
    }
    if (args_.dropout.probability > 0) {
      const uint32_t threshold = dropout_threshold(args_.dropout.probability);
      const float kept = 1 / (1 - args_.dropout.probability);
#pragma unroll
      for (int r = 0; r < Shape::kRowsPerWarp; ++r) {
        const int32_t key = kTransposed ? memory_.rows.position[first + r] : column_position;
        factors[r] = dropout_keeps(queries.dropout_key[query(r)], key, threshold) ? kept : 0;
      }
    }
#pragma unroll
    for (int r = 0; r < Shape::kRowsPerWarp; ++r) {
      memory_.weight[first + r][column] = scores[r] * factors[r];
      memory_.score[first + r][column] =
          score_gradient(scores[r], gradients[r] * factors[r], queries.delta[query(r)]);
    }
  }

  __device__ void accumulate() {
    const int vector = threadIdx.x % Shape::kVectors * 4;
    const int first = threadIdx.x / Shape::kVectors;
    const auto add = [](float4& sum, float factor, float4 x) {
      sum = {fmaf(factor, x.x, sum.x), fmaf(factor, x.y, sum.y), fmaf(factor, x.z, sum.z),
             fmaf(factor, x.w, sum.w)};
    };
#pragma unroll 4
    for (int column = 0; column < Shape::kColumns; ++column) {
      const float4 a = *reinterpret_cast<const float4*>(&memory_.first_column[column][vector]);
      const float4 b = *reinterpret_cast<const float4*>(&memory_.second_column[column][vector]);
#pragma unroll
      for (int i = 0; i < Shape::kOutputs; ++i) {
        const int row = first + i * (Shape::kThreads / Shape::kVectors);
        add(first_[i], memory_.score[row][column], a);
        if (kTransposed) {
          add(second_[i], memory_.weight[row][column], b);
        }
      }
    }
  }

  __device__ void write(const MutableRows& out, float4 (&sums)[Shape::kOutputs], float factor) {
    const int vector = threadIdx.x % Shape::kVectors * 4;
#pragma unroll
    for (int i = 0; i < Shape::kOutputs; ++i) {
      const int row = threadIdx.x / Shape::kVectors + i * (Shape::kThreads / Shape::kVectors);
      if (row < memory_.rows.count) {
        const int64_t place = memory_.rows.position[row] + work_.tile.row_shift;
        const int64_t at = out.strides.offset(work_.batch, place, work_.head) + vector;
        const float values[4] = {sums[i].x, sums[i].y, sums[i].z, sums[i].w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (vector + e >= args_.head_dim) {
            continue;
          }
          if (args_.is_partial) {
            static_cast<float*>(out.data)[at + e] = values[e] * factor;
          } else {
            static_cast<Element*>(out.data)[at + e] = from_float<Element>(values[e] * factor);
          }
        }
      }
      sums[i] = {0, 0, 0, 0};
    }
  }

  const BackwardArgs& args_;
  const TableView& table_;
  const WorkItem& work_;
  ScalarMemory<kWidth>& memory_;
  float4 first_[Shape::kOutputs] = {}, second_[Shape::kOutputs] = {};
};

template <typename Element, int kWidth, bool kTransposed>
__global__ void __launch_bounds__(ScalarShape<kWidth>::kThreads, ScalarShape<kWidth>::kBlocks)
    backward_scalar_kernel(const __grid_constant__ BackwardArgs args) {
  extern __shared__ __align__(128) unsigned char bytes[];
  auto& memory = *reinterpret_cast<ScalarMemory<kWidth>*>(bytes);
  const PatternView pattern{args.pattern};
  const TableView table = kTransposed ? pattern.transposed() : pattern.forward();
  const int64_t items = count_work(table, args.batch);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    WorkItem work;
    if (!find_work(table, item, args.batch, work) ||
        !widen_tile(work, ScalarShape<kWidth>::kRows)) {
      continue;
    }
    ScalarBackward<Element, kWidth, kTransposed> backward(args, table, work, memory);
    for (; work.tile.rows > 0; skip_rows(work.tile, ScalarShape<kWidth>::kRows)) {
      backward.run();
    }
  }
}

}  // namespace dilated::kernels::cuda::scalar

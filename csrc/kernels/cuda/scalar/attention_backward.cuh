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
#include "kernels/cuda/scalar/shapes.h"
#include "kernels/dropout.h"

namespace dilated::kernels::cuda::scalar {

template <int kWidth>
struct ScalarShape {
  static constexpr BackwardTile kTile{kWidth};
  static constexpr int kThreads = 128, kColumns = kTile.kColumns;
  static constexpr int kRows = kTile.rows();
  static constexpr int kPitch = pitch(kWidth);
  static constexpr int kRowsPerWarp = kRows / 4;
  static constexpr int kVectors = kWidth / 4;
  static constexpr int kOutputs =
      kRows * kVectors / kThreads;  // float4 of a gradient that a thread sums
};

/// Rows or columns of a tile.
template <int kCount>
struct ScalarList {
  int32_t position[kCount], place[kCount];
  int32_t head[kCount];
  Window window[kCount];  // of rows
  float bias[kCount];     // log of the multiplicity; -inf: weight 0
  float lse[kCount];      // of queries, as softmax_weight() takes it
  float delta[kCount];
  uint32_t dropout_key[kCount];
};

template <int kWidth>
struct ScalarMemory {
  using Shape = ScalarShape<kWidth>;
  float first_row[Shape::kRows][Shape::kPitch], second_row[Shape::kRows][Shape::kPitch];
  float first_column[Shape::kColumns][Shape::kPitch], second_column[Shape::kColumns][Shape::kPitch];
  float weight[Shape::kRows][Shape::kColumns], score[Shape::kRows][Shape::kColumns];
  ScalarList<Shape::kColumns> columns, rows;
};

template <typename Element, int kWidth, bool kTransposed>
class ScalarBackward {
 public:
  using Shape = ScalarShape<kWidth>;
  using List = ScalarList<Shape::kColumns>;

  __device__ ScalarBackward(const BackwardArgs& args, const TableView& table, const WorkItem& work,
                            ScalarMemory<kWidth>& memory)
      : args_(args), table_(table), work_(work), memory_(memory) {}

  /// The tile's first kRows rows, or all of them.
  __device__ void run() {
    const int32_t rows = min(work_.tile.rows, Shape::kRows);
    if (threadIdx.x < 32) {
      list_rows(rows);
    }
    __syncthreads();
    load_rows<Shape::kRows>(memory_.first_row, memory_.second_row, memory_.rows, kTransposed);
    Windows windows;
    int32_t columns = work_.group.columns;
    if (has_windows(work_, args_)) {
      windows = join_windows({memory_.rows.window[threadIdx.x % 32 % rows]});
      columns = count_columns(table_, work_, windows.some);
    }
    ColumnCursor cursor = cursor_of(table_, work_, windows.some);
    for (int32_t column = 0; column < columns; column += Shape::kColumns) {
      if (threadIdx.x < 32) {
        Column list[1];
        cursor.read(column, list);
        fill(memory_.columns, list[0], !kTransposed);
      }
      __syncthreads();
      load_rows<Shape::kColumns>(memory_.first_column, memory_.second_column, memory_.columns,
                                 !kTransposed);
      __syncthreads();
      weigh();
      __syncthreads();
      accumulate();
      __syncthreads();
    }
    write(kTransposed ? args_.grad_key : args_.grad_query, first_, args_.scale, rows);
    if (kTransposed) {
      write(args_.grad_value, second_, 1, rows);
    }
    __syncthreads();
  }

 private:
  __device__ void list_rows(int32_t rows) {
    const int32_t row = threadIdx.x;
    ColumnCursor cursor = row_cursor_of(table_, work_);
    Column list[1];
    cursor.read(work_.tile.first_row, list);
    list[0].place = list[0].position + work_.tile.row_shift;
    fill(memory_.rows, list[0], kTransposed);
    const Window* own = own_windows(table_, work_);
    memory_.rows.window[row] = window_of(own == nullptr ? nullptr : own + min(row, rows - 1),
                                         list[0].position, args_.is_causal, kTransposed);
    __syncwarp();
    if (row >= rows) {
      memory_.rows.bias[row] = negative_infinity();
    }
  }

  /// One lane's entry. Transposed, work_.head is a KV head and columns name a head of its group;
  /// forward, a query head.
  __device__ void fill(List& list, const Column& column, bool is_key) {
    const int at = threadIdx.x;
    const int32_t group = static_cast<int32_t>(args_.heads / args_.kv_heads);
    const int32_t head =
        is_key
            ? (kTransposed ? work_.head : work_.head / group)
            : (kTransposed ? work_.head * group + static_cast<int32_t>(column.head()) : work_.head);
    list.position[at] = column.position;
    list.place[at] = column.place;
    list.head[at] = head;
    list.bias[at] = column.log_multiplicity();
    if (!is_key) {
      const int64_t row =
          (static_cast<int64_t>(work_.batch) * args_.heads + head) * args_.queries + column.place;
      list.lse[at] = weight_lse(static_cast<const float*>(args_.lse)[row]);
      list.delta[at] = static_cast<const float*>(args_.delta)[row];
      if (args_.dropout.probability > 0) {
        list.dropout_key[at] =
            dropout_row_key(__ldg(args_.dropout.seed), work_.batch, head, column.position);
      }
    }
  }

  template <int kCount>
  __device__ void load_rows(float (&first)[kCount][Shape::kPitch],
                            float (&second)[kCount][Shape::kPitch], const List& list, bool is_key) {
    const Rows& first_source = is_key ? args_.key : args_.query;
    const Rows& second_source = is_key ? args_.value : args_.grad_out;
    const auto row_of = [&](const Rows& rows, int row) {
      return row_at<Element>(rows, work_.batch, list.place[row], list.head[row]);
    };
    for (int row = threadIdx.x / 32; row < kCount; row += Shape::kThreads / 32) {
      const Element* first_from = row_of(first_source, row);
      const Element* second_from = row_of(second_source, row);
#pragma unroll
      for (int d = threadIdx.x % 32; d < kWidth; d += 32) {
        const bool exists = d < args_.head_dim;
        first[row][d] = exists ? to_float(first_from[d]) : 0;
        second[row][d] = exists ? to_float(second_from[d]) : 0;
      }
    }
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
#pragma unroll
    for (int r = 0; r < Shape::kRowsPerWarp; ++r) {
      differentiate(first + r, column, scores[r], gradients[r]);
    }
  }

  __device__ void differentiate(int row, int column, float score, float gradient) {
    const List &rows = memory_.rows, &columns = memory_.columns;
    const float logit = logit_of(score, args_.scale, columns.bias[column] + rows.bias[row]);
    const float lse = kTransposed ? columns.lse[column] : rows.lse[row];
    const float weight =
        masked_weight(softmax_weight(logit, lse), rows.window[row], columns.position[column]);
    float factor = 1;
    if (args_.dropout.probability > 0) {
      const uint32_t row_key = kTransposed ? columns.dropout_key[column] : rows.dropout_key[row];
      const int32_t key = kTransposed ? rows.position[row] : columns.position[column];
      const bool keeps = dropout_keeps(row_key, key, dropout_threshold(args_.dropout.probability));
      factor = keeps ? 1 / (1 - args_.dropout.probability) : 0;
    }
    const float delta = kTransposed ? columns.delta[column] : rows.delta[row];
    memory_.weight[row][column] = weight * factor;
    memory_.score[row][column] = score_gradient(weight, gradient * factor, delta);
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

  __device__ void write(const MutableRows& out, float4 (&sums)[Shape::kOutputs], float factor,
                        int32_t rows) {
    const int vector = threadIdx.x % Shape::kVectors * 4;
#pragma unroll
    for (int i = 0; i < Shape::kOutputs; ++i) {
      const int row = threadIdx.x / Shape::kVectors + i * (Shape::kThreads / Shape::kVectors);
      if (row < rows) {
        const int64_t at =
            out.strides.offset(work_.batch, memory_.rows.place[row], work_.head) + vector;
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
__global__ void __launch_bounds__(ScalarShape<kWidth>::kThreads, 1)
    backward_scalar_kernel(const __grid_constant__ BackwardArgs args) {
  extern __shared__ __align__(128) unsigned char bytes[];
  auto& memory = *reinterpret_cast<ScalarMemory<kWidth>*>(bytes);
  const PatternView pattern{args.pattern};
  const TableView table = kTransposed ? pattern.transposed() : pattern.forward();
  const int64_t items = count_work(table, args.batch);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    WorkItem work;
    if (!find_work(table, item, args.batch, work)) {
      continue;
    }
    ScalarBackward<Element, kWidth, kTransposed> backward(args, table, work, memory);
    for (; work.tile.rows > 0; skip_rows(work.tile, ScalarShape<kWidth>::kRows)) {
      backward.run();
    }
  }
}

}  // namespace dilated::kernels::cuda::scalar

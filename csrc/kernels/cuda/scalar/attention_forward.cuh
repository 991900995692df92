// Forward pass for float32 on the ordinary arithmetic units: products are exact to float32, not
// tf32.
//
// 16 x 16 threads work on kRows rows: thread (y, x) holds kRows / 16 neighbouring ones. Of a key
// tile it scores keys x, x + 16, ..; of the output it holds columns 4 x + 64 j .. 4 x + 64 j + 3.
// The 16 threads of a row are half a warp. Keys and values take turns in one buffer, so that a
// block fits into the 99 KiB that the smallest of these GPUs have.
#pragma once

#include "kernels/cuda/primitives/forward_call.cuh"
#include "kernels/cuda/primitives/numerics.cuh"
#include "kernels/cuda/primitives/running.cuh"
#include "kernels/cuda/primitives/score.cuh"
#include "kernels/cuda/scalar/rows.cuh"
#include "kernels/cuda/scalar/shapes.h"

namespace dilated::kernels::cuda::scalar {

template <int kWidth>
struct FloatShape {
  static constexpr ForwardTile kTile{kWidth};
  static constexpr int kThreads = 256, kRows = kTile.rows(), kKeys = kTile.keys();
  static constexpr int kThreadRows = kRows / 16, kThreadKeys = kKeys / 16,
                       kThreadColumns = kWidth / 64;  // of float4
  static constexpr int kPitch = pitch(kWidth);
};

template <typename Shape>
struct FloatMemory {
  alignas(16) float query[Shape::kRows][Shape::kPitch];
  alignas(16) float key[Shape::kKeys][Shape::kPitch];  // then the values
  alignas(16) float weight[Shape::kRows][Shape::kKeys + 4];
  KeyTile<Shape::kKeys> keys;
  RowTileList<Shape::kRows> rows;
  uint32_t dropout_key[Shape::kRows];
  ColumnCursor cursor;  // warp 0's, here rather than in registers
};

__device__ inline void add_scaled(float4& sum, float a, float4 b) {
  sum = {fmaf(a, b.x, sum.x), fmaf(a, b.y, sum.y), fmaf(a, b.z, sum.z), fmaf(a, b.w, sum.w)};
}

/// Over half a warp: the 16 threads of a row.
template <typename Combine>
__device__ inline float reduce_row(float x, const Combine& combine) {
#pragma unroll
  for (int lanes = 1; lanes < 16; lanes *= 2) {
    x = combine(x, __shfl_xor_sync(kAllLanes, x, lanes));
  }
  return x;
}

template <typename Shape>
class FloatThread {
 public:
  static constexpr int kRows = Shape::kThreadRows, kKeys = Shape::kThreadKeys,
                       kColumns = Shape::kThreadColumns;

  __device__ FloatThread(const ForwardCall& call, FloatMemory<Shape>& memory)
      : call_(call), memory_(memory) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      reference_[r] = negative_infinity();
    }
  }

  /// With the keys in shared memory: leaves the weights there.
  __device__ void weigh_keys() {
    float scores[kRows][kKeys] = {};
    multiply_keys(scores);
    mask(scores);
    exponentiate(scores);
    store(scores);
  }

  /// With the values and weights there.
  __device__ void multiply_values();

  __device__ void finish(const WorkItem& work, int32_t rows) const;

 private:
  /// Columns column .. column + 3 of the thread's rows.
  template <int kPitch>
  __device__ void load_rows(const float (&tile)[Shape::kRows][kPitch], int column,
                            float4 (&to)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      to[r] = *reinterpret_cast<const float4*>(&tile[first_row_ + r][column]);
    }
  }

  /// scores += Q K^T.
  __device__ void multiply_keys(float (&scores)[kRows][kKeys]) const;
  __device__ void mask(float (&scores)[kRows][kKeys]) const;
  __device__ void exponentiate(float (&logits)[kRows][kKeys]);
  __device__ void store(float (&weights)[kRows][kKeys]);

  const ForwardCall& call_;
  FloatMemory<Shape>& memory_;
  const int x_ = threadIdx.x % 16, first_row_ = threadIdx.x / 16 * kRows;
  float4 out_[kRows][kColumns] = {};
  float reference_[kRows], sum_[kRows] = {};
};

template <typename Shape>
__device__ void FloatThread<Shape>::multiply_keys(float (&scores)[kRows][kKeys]) const {
#pragma unroll 1
  for (int d = 0; d < Shape::kPitch - 4; d += 4) {
    float4 query[kRows];
    load_rows(memory_.query, d, query);
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      const float4 key = *reinterpret_cast<const float4*>(&memory_.key[x_ + 16 * k][d]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        scores[r][k] = dot(query[r], key, scores[r][k]);
      }
    }
  }
}

/// scores become logits. What rows don't see is looked at only in tiles that have any.
template <typename Shape>
__device__ void FloatThread<Shape>::mask(float (&scores)[kRows][kKeys]) const {
#pragma unroll
  for (int k = 0; k < kKeys; ++k) {
    const float bias = memory_.keys.bias[x_ + 16 * k];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      scores[r][k] = logit_of(scores[r][k], call_.args.scale, bias);
    }
  }
  if (memory_.keys.is_masked) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Window window =
          window_of(memory_.rows, first_row_ + r, call_.args.is_causal, /*over_keys=*/false);
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        scores[r][k] = masked_logit(scores[r][k], window, memory_.keys.position[x_ + 16 * k]);
      }
    }
  }
}

/// Logits become weights; sums and outputs follow the rows' maxima.
template <typename Shape>
__device__ void FloatThread<Shape>::exponentiate(float (&logits)[kRows][kKeys]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float largest = negative_infinity();
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      largest = fmaxf(largest, logits[r][k]);
    }
    largest = reduce_row(largest, [](float a, float b) { return fmaxf(a, b); });
    const float before = reference_[r];
    reference_[r] = fmaxf(before, largest);
    const float reference = finite(reference_[r]);
    const float factor = weight_of(before, reference);
    sum_[r] *= factor;
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      logits[r][k] = weight_of(logits[r][k], reference);
      sum_[r] += logits[r][k];
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      out_[r][j] = {out_[r][j].x * factor, out_[r][j].y * factor, out_[r][j].z * factor,
                    out_[r][j].w * factor};
    }
  }
}

/// The weights go to shared memory, without what dropout removes.
template <typename Shape>
__device__ void FloatThread<Shape>::store(float (&weights)[kRows][kKeys]) {
  const float probability = call_.args.dropout.probability;
  if (probability > 0) {
    const uint32_t threshold = dropout_threshold(probability);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const uint32_t row_key = memory_.dropout_key[first_row_ + r];
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        const int32_t key = memory_.keys.position[x_ + 16 * k];
        weights[r][k] = dropout_keeps(row_key, key, threshold) ? weights[r][k] : 0;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {
      memory_.weight[first_row_ + r][x_ + 16 * k] = weights[r][k];
    }
  }
}

template <typename Shape>
__device__ void FloatThread<Shape>::multiply_values() {
#pragma unroll 1
  for (int key = 0; key < Shape::kKeys; key += 4) {
    float4 weight[kRows];
    load_rows(memory_.weight, key, weight);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float4 value =
            *reinterpret_cast<const float4*>(&memory_.key[key + k][4 * x_ + 64 * j]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          add_scaled(out_[r][j],
                     k == 0   ? weight[r].x
                     : k == 1 ? weight[r].y
                     : k == 2 ? weight[r].z
                              : weight[r].w,
                     value);
        }
      }
    }
  }
}

template <typename Shape>
__device__ void FloatThread<Shape>::finish(const WorkItem& work, int32_t rows) const {
  const ForwardArgs& args = call_.args;
  const float zero_keys = static_cast<float>(work.group.zero_keys);
  auto* origin = row_at<float>(args.out, work.batch, work.tile.row_shift, work.head);
  const auto* running_origin =
      row_at<float>(args.running_out, work.batch, work.tile.row_shift, work.head);
  const int64_t head_row =
      (work.batch * args.heads + work.head) * args.queries + work.tile.row_shift;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row_ + r;
    float sum = reduce_row(sum_[r], [](float a, float b) { return a + b; });
    const float reference = zero_keys > 0 ? fmaxf(reference_[r], 0.0f) : reference_[r];
    float factor = reference_[r] == reference ? 1 : exp_approx(reference_[r] - reference);
    sum = zero_keys > 0 ? sum * factor + zero_keys * exp_approx(-reference) : sum;
    factor = sum == 0 ? 0 : factor / (sum * (1 - args.dropout.probability));
    if (row >= rows) {
      continue;
    }
    const int32_t position = memory_.rows.position[row];
    const float running_lse =
        args.running_lse == nullptr
            ? negative_infinity()
            : static_cast<const float*>(args.running_lse)[head_row + position];
    const float block_lse = sum == 0 ? negative_infinity() : reference + logf(sum);
    const Merged merged = merge(running_lse, block_lse);
    factor *= merged.block_weight;
    if (x_ == 0) {
      static_cast<float*>(args.lse)[head_row + position] = merged.lse;
    }
    float* to = origin + position * args.out.strides.row;
    const float* running = running_origin + position * args.running_out.strides.row;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float values[4] = {out_[r][j].x, out_[r][j].y, out_[r][j].z, out_[r][j].w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int d = 4 * x_ + 64 * j + e;
        if (d < args.head_dim) {
          const float before = running_lse == negative_infinity() ? 0 : running[d];
          to[d] = values[e] * factor + before * merged.running_weight;
        }
      }
    }
  }
}

/// The listed rows of keys, or values, of both tensors.
template <typename Shape>
__device__ void copy_keys(const ForwardArgs& args, const Rows& near, const Rows& far,
                          const WorkItem& work, int32_t key_head, FloatMemory<Shape>& memory) {
  copy_rows<Shape::kThreads, float>(
      memory.key,
      [&](int row) {
        const int32_t place = memory.keys.place[row];
        const bool is_far = place >= args.keys;
        return row_at<float>(is_far ? far : near, work.batch, is_far ? place - args.keys : place,
                             key_head);
      },
      static_cast<int32_t>(args.head_dim), near.is_aligned && far.is_aligned);
  wait_for_copies<0>();
}

template <typename Shape>
__device__ void forward_float_tile(const ForwardCall& call, const TableView& table,
                                   const WorkItem& work, FloatMemory<Shape>& memory) {
  const ForwardArgs& args = call.args;
  const int32_t head_dim = static_cast<int32_t>(args.head_dim);
  const KeyList keys = begin_rows(table, work, args, memory.rows);
  if (args.dropout.probability > 0 && threadIdx.x < Shape::kRows) {
    memory.dropout_key[threadIdx.x] =
        row_dropout_key(args, work, memory.rows.position[threadIdx.x]);
  }
  const auto list = [&](int32_t first) {
    if (threadIdx.x < 32 && first < keys.columns) {
      read_keys(memory.cursor, first, keys.windows.all, memory.keys);
    }
  };
  if (threadIdx.x < 32) {
    memory.cursor = cursor_of(table, work, keys.windows.some);
    __syncwarp();
  }
  list(0);
  const auto copy = [&](auto& tile, const Rows& rows, const int32_t* listed, const float* origin) {
    copy_rows<Shape::kThreads, float>(
        tile, [&](int row) { return origin + listed[row] * rows.strides.row; }, head_dim,
        rows.is_aligned);
    wait_for_copies<0>();
  };
  copy(memory.query, args.query, memory.rows.position,
       row_at<float>(args.query, work.batch, work.tile.row_shift, work.head));
  const int32_t key_head = work.head / call.heads_per_key_head;
  const auto copy_listed = [&](const Rows& near, const Rows& far) {
    if (far.data == nullptr) {
      copy(memory.key, near, memory.keys.place, row_at<float>(near, work.batch, 0, key_head));
    } else {
      copy_keys(args, near, far, work, key_head, memory);
    }
  };
  FloatThread<Shape> thread(call, memory);
  for (int32_t first = 0; first < keys.columns; first += Shape::kKeys) {
    __syncthreads();
    copy_listed(args.key, args.far_key);
    __syncthreads();
    thread.weigh_keys();
    __syncthreads();
    copy_listed(args.value, args.far_value);
    __syncthreads();
    list(first + Shape::kKeys);  // the other warps are already multiplying
    thread.multiply_values();
  }
  thread.finish(work, work.tile.rows);
}

template <int kWidth>
__global__ void __launch_bounds__(256, 2)
    attention_forward_float_kernel(const __grid_constant__ ForwardCall call) {
  using Shape = FloatShape<kWidth>;
  extern __shared__ __align__(128) unsigned char bytes[];
  FloatMemory<Shape>& memory = *reinterpret_cast<FloatMemory<Shape>*>(bytes);
  const TableView table = PatternView{call.args.pattern}.forward();
  const int64_t items = count_work(table, call.args.batch);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    WorkItem work;
    if (!find_work(table, item, call.args.batch, work) || !widen_tile(work, Shape::kRows)) {
      continue;
    }
    for (; work.tile.rows > 0; skip_rows(work.tile, Shape::kRows)) {
      forward_float_tile<Shape>(call, table, work, memory);
      __syncthreads();
    }
  }
}

}  // namespace dilated::kernels::cuda::scalar

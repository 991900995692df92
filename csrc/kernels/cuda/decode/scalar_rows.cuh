// A warp's running softmax of up to four query heads over tiles of rows of any type and size, in
// float32 arithmetic: a lane has every 32nd column.
#pragma once

#include "kernels/cuda/decode/plan.cuh"
#include "kernels/cuda/primitives/numerics.cuh"

namespace dilated::kernels::cuda::decode {

/// kWidth: a multiple of 64, at least head_dim.
template <typename Element, int kWidth>
class ScalarRows {
 public:
  static constexpr int kColumns = kWidth, kWarps = warps_of(kWidth);
  using Piece = Element;  // that rows are copied in

  __device__ ScalarRows(const AttendCall& call, const Block& block)
      : args_(call.args), block_(block) {
    const float scale = static_cast<float>(args_.scale) * kLog2E;
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      read(row_at<Element>(args_.query, block.batch, block.index,
                           block.first_head + min(head, block.heads - 1)),
           query_[head]);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        query_[head][i] *= scale;
      }
    }
  }

  __device__ void take(const Tile& tile) {
    constexpr int kKeys = 4;  // read at once
    for (int first = 0; first < kTileKeys && tile.has(first); first += kKeys) {
      float keys[kKeys][kSteps], values[kKeys][kSteps];
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        read(tile.row<Element>(args_.key, args_.new_key, block_, first + i), keys[i]);
        read(tile.row<Element>(args_.value, args_.new_value, block_, first + i), values[i]);
      }
      uint32_t outer[kKeys];
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        outer[i] = tile.outer_of(first + i);
      }
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        if (head < block_.heads && tile.has_head(head)) {
          float scores[kKeys];
#pragma unroll
          for (int i = 0; i < kKeys; ++i) {
            scores[i] = tile.has(first + i)
                            ? score(head, keys[i]) + log2_approx(tile.multiplicity(outer[i], head))
                            : negative_infinity();
          }
          add(head, scores, values);
        }
      }
    }
  }

  /// This warp's sums [heads][kWidth], maxima and denominators.
  __device__ void write(float* sums, float* max, float* denominator) const {
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      max[head] = max_[head];
      denominator[head] = denominator_[head];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        sums[head * kWidth + lane() + 32 * i] = sums_[head][i];
      }
    }
  }

 private:
  static constexpr int kHeads = 4, kSteps = kWidth / 32;

  static __device__ int lane() { return static_cast<int>(threadIdx.x % 32); }

  __device__ void read(const Element* row, float (&columns)[kSteps]) const {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int column = lane() + 32 * i;
      columns[i] = column < args_.head_dim ? to_float(row[column]) : 0.0f;
    }
  }

  /// The same in every lane.
  __device__ float score(int head, const float (&key)[kSteps]) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      sum = fmaf(query_[head][i], key[i], sum);
    }
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    }
    return sum;
  }

  template <int kKeys>
  __device__ void add(int head, const float (&scores)[kKeys],
                      const float (&values)[kKeys][kSteps]) {
    float max = max_[head];
#pragma unroll
    for (const float score : scores) {
      max = fmaxf(max, score);
    }
    const float factor = exp2_approx(max_[head] - max);  // a key at least has a finite score
    max_[head] = max;
    denominator_[head] *= factor;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      sums_[head][i] *= factor;
    }
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
      const float weight = exp2_approx(scores[key] - max);
      denominator_[head] += weight;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        sums_[head][i] = fmaf(weight, values[key][i], sums_[head][i]);
      }
    }
  }

  const DecodeStepArgs& args_;
  const Block& block_;
  float query_[kHeads][kSteps], sums_[kHeads][kSteps] = {};
  float max_[kHeads] = {negative_infinity(), negative_infinity(), negative_infinity(),
                        negative_infinity()};
  float denominator_[kHeads] = {};
};

}  // namespace dilated::kernels::cuda::decode

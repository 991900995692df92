// A warp's running softmax of up to eight query heads over tiles of 16-bit rows, on tensor cores.
//
// Everything comes from memory in the 16-byte pieces that it lies in and goes straight into
// fragments (primitives/mma.cuh), as the order of what a product sums over is free, as long as both
// operands agree, and so is the order of the result's rows. With lane = 4 * g + t:
//
//   scores^T = K Q^T   K [16 keys x dims]: lane reads keys g and g + 8, dims 8t to 8t + 7 of 32;
//                      Q^T [dims x 8 heads]: head g, the same dims
//   out^T += V^T P^T   V^T [dims x 16 keys]: lane reads keys 2t, 2t + 1, 2t + 8, 2t + 9, dims 8g to
//                      8g + 7 of 64, and pairs up keys; P^T: the scores' fragment, transposed
#pragma once

#include "kernels/cuda/decode/plan.cuh"
#include "kernels/cuda/primitives/mma.cuh"
#include "kernels/cuda/primitives/numerics.cuh"

namespace dilated::kernels::cuda::decode {

/// A register of 8 x 8 16-bit elements, transposed over the warp.
__device__ inline uint32_t transpose(uint32_t matrix) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
  return transposed;
}

/// kWidth: a multiple of 64, at least head_dim, which is a multiple of 8.
template <typename Element, int kWidth>
class TensorCoreRows {
 public:
  static constexpr int kColumns = kWidth, kWarps = warps_of(kWidth);
  using Piece = uint4;  // that rows are copied in

  __device__ TensorCoreRows(const AttendCall& call, const Block& block)
      : args_(call.args), block_(block) {
    scale_ = static_cast<float>(args_.scale) * kLog2E;
    const Element* query = row_at<Element>(args_.query, block.batch, block.index,
                                           block.first_head + min(group(), block.heads - 1));
#pragma unroll
    for (int piece = 0; piece < kWidth / 32; ++piece) {
      query_[piece] = read(query, 32 * piece + 8 * place());
    }
  }

  __device__ void take(const Tile& tile) {
    float scores[4] = {};
    multiply_keys(tile, scores);
    uint4 values[kWidth / 64][4];
    read_values(tile, values);
    mask(tile, scores);
    weigh(scores);
    const uint32_t low = transpose(pack<Element>(scores[0], scores[1]));
    const uint32_t high = transpose(pack<Element>(scores[2], scores[3]));
    add_values(values, low, high);
  }

  /// This warp's sums [heads][kWidth], maxima and denominators.
  __device__ void write(float* sums, float* max, float* denominator) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        denominator_[h] += __shfl_xor_sync(kAllLanes, denominator_[h], lanes);
      }
      const int head = 2 * place() + h;
      if (group() == 0) {
        max[head] = max_[h];
        denominator[head] = denominator_[h];
      }
#pragma unroll
      for (int piece = 0; piece < kWidth / 64; ++piece) {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          *reinterpret_cast<float2*>(sums + head * kWidth + 64 * piece + 8 * group() + 2 * pair) = {
              sums_[piece][pair][h], sums_[piece][pair][2 + h]};
        }
      }
    }
  }

 private:
  static __device__ int group() { return static_cast<int>(threadIdx.x % 32 / 4); }
  static __device__ int place() { return static_cast<int>(threadIdx.x % 4); }

  __device__ uint4 read(const Element* row, int column) const {
    return column < args_.head_dim ? __ldg(reinterpret_cast<const uint4*>(row + column))
                                   : uint4{0, 0, 0, 0};
  }

  __device__ void multiply_keys(const Tile& tile, float (&scores)[4]) const {
    uint4 keys[kWidth / 32][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Element* key = tile.row<Element>(args_.key, args_.new_key, block_, group() + 8 * half);
#pragma unroll
      for (int piece = 0; piece < kWidth / 32; ++piece) {
        keys[piece][half] = read(key, 32 * piece + 8 * place());
      }
    }
#pragma unroll
    for (int piece = 0; piece < kWidth / 32; ++piece) {
      const uint4 &low = keys[piece][0], &high = keys[piece][1], &query = query_[piece];
      mma_16x8x16<Element>(scores, {low.x, high.x, low.y, high.y}, query.x, query.y);
      mma_16x8x16<Element>(scores, {low.z, high.z, low.w, high.w}, query.z, query.w);
    }
  }

  __device__ void read_values(const Tile& tile, uint4 (&values)[kWidth / 64][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = 2 * place() + i % 2 + i / 2 * 8;
      const Element* value = tile.row<Element>(args_.value, args_.new_value, block_, key);
#pragma unroll
      for (int piece = 0; piece < kWidth / 64; ++piece) {
        values[piece][i] = read(value, 64 * piece + 8 * group());
      }
    }
  }

  /// Scores to base 2, with the logarithm of how often they count; -inf where no key is.
  __device__ void mask(const Tile& tile, float (&scores)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = group() + 8 * half;
      const uint32_t outer = tile.outer_of(key);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int head = 2 * place() + h;
        float& score = scores[2 * half + h];
        score = tile.has(key) && tile.has_head(head)
                    ? fmaf(score, scale_, log2_approx(tile.multiplicity(outer, head)))
                    : negative_infinity();
      }
    }
  }

  /// Scores to weights relative to the largest score so far, which rescales the earlier sums.
  __device__ void weigh(float (&scores)[4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float max = fmaxf(max_[h], fmaxf(scores[h], scores[2 + h]));
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, lanes));
      }
      const float base = max == negative_infinity() ? 0.0f : max;
      const float factor = exp2_approx(max_[h] - base);
      max_[h] = max;
      scores[h] = exp2_approx(scores[h] - base);
      scores[2 + h] = exp2_approx(scores[2 + h] - base);
      denominator_[h] = denominator_[h] * factor + scores[h] + scores[2 + h];
#pragma unroll
      for (int piece = 0; piece < kWidth / 64; ++piece) {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          sums_[piece][pair][h] *= factor;
          sums_[piece][pair][2 + h] *= factor;
        }
      }
    }
  }

  __device__ void add_values(const uint4 (&values)[kWidth / 64][4], uint32_t low, uint32_t high) {
    const auto multiply = [&](float (&sums)[4], uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
      mma_16x8x16<Element>(sums,
                           {__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632),
                            __byte_perm(c, d, 0x5410), __byte_perm(c, d, 0x7632)},
                           low, high);
    };
#pragma unroll
    for (int piece = 0; piece < kWidth / 64; ++piece) {
      const uint4(&of)[4] = values[piece];
      multiply(sums_[piece][0], of[0].x, of[1].x, of[2].x, of[3].x);
      multiply(sums_[piece][1], of[0].y, of[1].y, of[2].y, of[3].y);
      multiply(sums_[piece][2], of[0].z, of[1].z, of[2].z, of[3].z);
      multiply(sums_[piece][3], of[0].w, of[1].w, of[2].w, of[3].w);
    }
  }

  const DecodeStepArgs& args_;
  const Block& block_;
  float scale_;
  uint4 query_[kWidth / 32];
  // Columns 8g + 2 pair and + 1 of heads 2t and 2t + 1: (even, 2t), (even, 2t + 1), (odd, 2t), ...
  float sums_[kWidth / 64][4][4] = {};
  float max_[2] = {negative_infinity(), negative_infinity()}, denominator_[2] = {};
};

}  // namespace dilated::kernels::cuda::decode

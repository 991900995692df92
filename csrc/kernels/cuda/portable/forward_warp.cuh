// What one warp does in the 16-bit forward pass: scores, running softmax and output of its rows.
//
// A warp owns kWarpTiles * 16 rows. Scores and the output stay in registers as mma accumulators;
// the running softmax is in base 2 and float32. Any reference that exponents are taken against
// gives the same result as long as nothing overflows, so most key tiles are computed against the
// old one without looking for their maximum. Where weights turn out to be too large for 16 bits, or
// references for scores that are scaled to base 2 in one step, the tile's scores are computed
// again, rounded as logits, and the reference follows.
//
// One class, since its steps share the accumulators.
#pragma once

#include <cfloat>

#include "kernels/cuda/portable/shapes.h"
#include "kernels/cuda/primitives/float_row.cuh"
#include "kernels/cuda/primitives/forward_call.cuh"
#include "kernels/cuda/primitives/mma.cuh"
#include "kernels/cuda/primitives/numerics.cuh"
#include "kernels/cuda/primitives/running.cuh"

namespace dilated::kernels::cuda::portable {

template <int kHeadDim_, int kWarps_, int kWarpTiles_>
struct ForwardShape {
  static constexpr int kHeadDim = kHeadDim_, kWarps = kWarps_, kWarpTiles = kWarpTiles_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRows = kWarps * kWarpTiles * 16;
  static constexpr ForwardTile kTile{kHeadDim, kRows};
  static constexpr int kKeys = kTile.keys();
  static constexpr int kSteps = kHeadDim / 16;  // of the product with the keys
  static constexpr bool kQueryInRegisters = kWarpTiles * kHeadDim <= 128;
  static constexpr int kLists = kTile.lists();
  // Warps on a multiprocessor that leave each thread the registers that it needs.
  static constexpr int kBlocks = (kHeadDim <= 64 && kWarpTiles == 1 ? 16 : 8) / kWarps;
  using Keys = RowTile<kHeadDim, kKeys, kThreads>;
  using Query = RowTile<kHeadDim, kRows, kThreads>;
  using Layout = typename Keys::Layout;
};

/// Shared memory of a block. Tiles are aligned to 128 bytes.
template <typename Shape>
struct ForwardMemory {
  alignas(128) unsigned char query[Shape::Query::kBytes];  // later the output
  alignas(128) unsigned char key[2][Shape::Keys::kBytes];
  alignas(128) unsigned char value[2][Shape::Keys::kBytes];
  KeyTile<Shape::kKeys> keys[Shape::kLists];  // being used, copied and listed
  QueryTile<Shape::kRows> rows;
  // What follows is here rather than in registers, which the products need.
  WorkItem work;
  int64_t item;
  const char* key_origin;  // of the work item's head, see RowSource
  const char* value_origin;
  int32_t key_tiles;            // of the work item
  int32_t query_begin;          // position of the first row of the query tensor
  int32_t last_plain_position;  // keys after it lie after some row
  ColumnCursor cursor;          // warp 0's
};

/// One warp's part of a tile, in registers. r counts the rows of which a lane holds some columns: r
/// is row 8 * r + lane / 4 of the warp.
template <typename Element, typename Shape>
class ForwardWarp {
 public:
  static constexpr int kTiles = Shape::kWarpTiles, kWarpRows = 2 * kTiles;
  static constexpr int kKeyTiles = Shape::kKeys / 8, kValueTiles = Shape::kHeadDim / 8;
  using Layout = typename Shape::Layout;

  __device__ ForwardWarp(const ForwardCall& call, ForwardMemory<Shape>& memory)
      : call_(call), memory_(memory) {
    const int lane = threadIdx.x % 32;
    first_row_ = threadIdx.x / 32 * kTiles * 16;
    query_ = shared_address(memory.query) + Layout::offset(first_row_ + lane % 16, lane / 16);
    key_ = Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    value_ = Layout::offset(lane % 16, lane / 16);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      reference_[r] = negative_infinity();
      sum_[r] = 0;
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kValueTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          out_[m][n][e] = 0;
        }
      }
    }
  }

  /// Once the query tile is in shared memory.
  __device__ void load_query() {
    if constexpr (Shape::kQueryInRegisters) {
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step) {
        load_query_step(step, query_fragments_[step]);
      }
    }
  }

  /// The keys and values in `stage`. On the way, the rows' references follow their maxima only
  /// where they must.
  __device__ void attend(int stage, const KeyTile<Shape::kKeys>& keys, bool is_first) {
    const uint32_t key = shared_address(memory_.key[stage]) + key_;
    float sums[kWarpRows];
    bool done = false;
    if (keys.is_plain && !is_first) {
      multiply_keys(key);
      weigh_scores(keys.plain_bias_log2, sums);
      done = fit(sums);
    }
    if (!done) {
      multiply_keys(key);
      apply_biases(keys);
      move_references();
      weigh_logits(sums);
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      sum_[r] += sums[r];
    }
    if (call_.args.dropout.probability > 0) {
      drop(keys);
    }
    multiply_values(shared_address(memory_.value[stage]) + value_);
  }

  template <bool kIsBlock>
  __device__ void finish(const WorkItem& work, int32_t rows, int32_t query_begin);

 private:
  __device__ void load_query_step(int step, uint32_t (&fragments)[kTiles][4]) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      load_matrices(fragments[m], Layout::advance(query_, step) + m * 16 * Layout::kRowBytes);
    }
  }

  __device__ void multiply_keys(uint32_t key) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          scores_[m][n][e] = 0;
        }
      }
    }
    if constexpr (Shape::kQueryInRegisters) {
      // Keys outside: the first scores are complete, and their exponentials can begin, while the
      // last are computed.
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
#pragma unroll
        for (int step = 0; step < Shape::kSteps; ++step) {
          multiply_step(key, step, n, query_fragments_[step]);
        }
      }
    } else {
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step) {
        uint32_t fragments[kTiles][4];
        load_query_step(step, fragments);
#pragma unroll
        for (int n = 0; n < kKeyTiles; n += 2) {
          multiply_step(key, step, n, fragments);
        }
      }
    }
  }

  __device__ void multiply_step(uint32_t key, int step, int n, const uint32_t (&query)[kTiles][4]) {
    uint32_t b[4];
    load_matrices(b, Layout::advance(key, step) + n * 8 * Layout::kRowBytes);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      mma_16x8x16<Element>(scores_[m][n], query[m], b[0], b[1]);
      mma_16x8x16<Element>(scores_[m][n + 1], query[m], b[2], b[3]);
    }
  }

  /// Scores to logits with their multiplicities, -inf where a row may not look.
  __device__ void apply_biases(const KeyTile<Shape::kKeys>& keys) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      const float2 bias = *reinterpret_cast<const float2*>(&keys.bias[n * 8 + lane % 4 * 2]);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          scores_[m][n][e] = fmaf(scores_[m][n][e], call_.args.scale, e % 2 == 0 ? bias.x : bias.y);
        }
      }
    }
    if (!keys.is_causal) {
      return;
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const int32_t row = row_position(r);
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const int2 position = *reinterpret_cast<const int2*>(&keys.position[n * 8 + lane % 4 * 2]);
        float* score = &scores_[r / 2][n][r % 2 * 2];
        score[0] = position.x > row ? negative_infinity() : score[0];
        score[1] = position.y > row ? negative_infinity() : score[1];
      }
    }
  }

  /// Scores become weights, exp(score * scale + bias - reference), by one multiply-add. sums: of
  /// this lane's part of each row.
  __device__ void weigh_scores(float bias_log2, float (&sums)[kWarpRows]) {
    float offset[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      offset[r] = fmaf(fmaxf(reference_[r], -FLT_MAX), -kLog2E, bias_log2);
    }
    exponentiate(sums,
                 [&](float score, int r) { return fmaf(score, call_.scale_log2, offset[r]); });
  }

  /// Logits become weights; that of a row's reference is exactly 1.
  __device__ void weigh_logits(float (&sums)[kWarpRows]) {
    float base[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      base[r] = fmaxf(reference_[r], -FLT_MAX);
    }
    exponentiate(sums, [&](float logit, int r) { return (logit - base[r]) * kLog2E; });
  }

  template <typename Exponent>
  __device__ void exponentiate(float (&sums)[kWarpRows], const Exponent& exponent) {
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      sums[r] = 0;
    }
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores_[r / 2][n][r % 2 * 2 + e];
          score = exp2_approx(exponent(score, r));
          sums[r] += score;
        }
      }
    }
  }

  /// Whether the weights are within what 16 bits hold, and were taken against a reference that the
  /// row has seen, small enough for its rounding not to show.
  __device__ bool fit(const float (&sums)[kWarpRows]) const {
    bool fits = true;
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      // As integers, which takes fewer registers.
      fits = fits && !(sums[r] > kLargestSum) &&
             (__float_as_int(reference_[r]) & INT_MAX) <= __float_as_int(kLargestReference);
    }
    return __all_sync(kAllLanes, fits);
  }

  /// The scores are logits.
  __device__ void move_references() {
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      float largest = scores_[r / 2][0][r % 2 * 2];
#pragma unroll
      for (int i = 1; i < 2 * kKeyTiles; ++i) {
        largest = fmaxf(largest, scores_[r / 2][i / 2][r % 2 * 2 + i % 2]);
      }
      const float reference = fmaxf(reference_[r], quad_max(largest));
      const float factor =
          reference_[r] == negative_infinity() ? 0 : exp_approx(reference_[r] - reference);
      reference_[r] = reference;
      sum_[r] *= factor;
#pragma unroll
      for (int n = 0; n < kValueTiles; ++n) {
        out_[r / 2][n][r % 2 * 2] *= factor;
        out_[r / 2][n][r % 2 * 2 + 1] *= factor;
      }
    }
  }

  /// Weights that dropout removes become zero; the sums keep them.
  __device__ void drop(const KeyTile<Shape::kKeys>& keys) {
    const uint32_t threshold = dropout_threshold(call_.args.dropout.probability);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const uint32_t key = memory_.rows.dropout_key[row_index(r)];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const int2 position = *reinterpret_cast<const int2*>(&keys.position[n * 8 + lane % 4 * 2]);
        float* score = &scores_[r / 2][n][r % 2 * 2];
        score[0] = dropout_keeps(key, position.x, threshold) ? score[0] : 0;
        score[1] = dropout_keeps(key, position.y, threshold) ? score[1] : 0;
      }
    }
  }

  __device__ void multiply_values(uint32_t value) {
#pragma unroll
    for (int step = 0; step < Shape::kKeys / 16; ++step) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* score = &scores_[m][2 * step + i / 2][i % 2 * 2];
          a[m][i] = pack<Element>(score[0], score[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kValueTiles; n += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, Layout::advance(value, n / 2) + step * 16 * Layout::kRowBytes);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma_16x8x16<Element>(out_[m][n], a[m], b[0], b[1]);
          mma_16x8x16<Element>(out_[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  __device__ void scale_row(int r, float factor);
  __device__ float merge_row(int r, float lse, const WorkItem& work, int64_t head_row,
                             int32_t query_begin);
  __device__ void store_rows(const WorkItem& work, int32_t rows, int32_t query_begin);
  __device__ void write_out(const WorkItem& work, int32_t rows, int32_t query_begin);

  __device__ int row_index(int r) const { return first_row_ + r * 8 + threadIdx.x % 32 / 4; }
  __device__ int32_t row_position(int r) const { return memory_.rows.position[row_index(r)]; }

  static constexpr float kLargestSum = 32768, kLargestReference = 256;

  const ForwardCall& call_;
  ForwardMemory<Shape>& memory_;
  int first_row_;
  uint32_t query_, key_,
      value_;  // addresses, or offsets into a stage, of what this lane hands to ldmatrix
  uint32_t query_fragments_[Shape::kQueryInRegisters ? Shape::kSteps : 1][kTiles][4];
  float scores_[kTiles][kKeyTiles][4];
  float out_[kTiles][kValueTiles][4];
  float reference_[kWarpRows], sum_[kWarpRows];
};

/// Normalises, and writes the rows that exist: out rounded at most once, lse as natural logarithm.
/// kIsBlock: merges with a running result, if there is one, and leaves a partial result in float32.
/// Within the plain kernel that would slow its loop (docs/performance.md).
template <typename Element, typename Shape>
template <bool kIsBlock>
__device__ void ForwardWarp<Element, Shape>::finish(const WorkItem& work, int32_t rows,
                                                    int32_t query_begin) {
  const ForwardArgs& args = call_.args;
  const float zero_keys = static_cast<float>(work.group.zero_keys);
  const int64_t head_row = (work.batch * args.heads + work.head) * args.queries - query_begin;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    float sum = quad_sum(sum_[r]);
    float reference = reference_[r];
    float factor = 1;
    if (zero_keys > 0) {
      reference = fmaxf(reference, 0.0f);
      factor = exp_approx(reference_[r] - reference);
      sum = sum * factor + zero_keys * exp_approx(-reference);
    }
    scale_row(r, sum == 0 ? 0 : factor / (sum * (1 - args.dropout.probability)));
    float lse = sum == 0 ? negative_infinity() : reference + logf(sum);
    if constexpr (kIsBlock) {
      if (args.running_lse != nullptr) {
        lse = merge_row(r, lse, work, head_row, query_begin);
      }
    }
    if (threadIdx.x % 4 == 0 && row_index(r) < rows) {
      static_cast<float*>(args.lse)[head_row + row_position(r)] = lse;
    }
  }
  if constexpr (kIsBlock) {
    if (args.is_partial) {
      store_rows(work, rows, query_begin);
      return;
    }
  }
  write_out(work, rows, query_begin);
}

template <typename Element, typename Shape>
__device__ void ForwardWarp<Element, Shape>::scale_row(int r, float factor) {
#pragma unroll
  for (int n = 0; n < kValueTiles; ++n) {
    out_[r / 2][n][r % 2 * 2] *= factor;
    out_[r / 2][n][r % 2 * 2 + 1] *= factor;
  }
}

/// Adds the running result of the row to its normalised output; the log-sum-exp of both.
template <typename Element, typename Shape>
__device__ float ForwardWarp<Element, Shape>::merge_row(int r, float lse, const WorkItem& work,
                                                        int64_t head_row, int32_t query_begin) {
  const ForwardArgs& args = call_.args;
  const int32_t position = row_position(r);
  const float running_lse = static_cast<const float*>(args.running_lse)[head_row + position];
  if (running_lse == negative_infinity()) {
    return lse;
  }
  const Merged merged = merge(running_lse, lse);
  scale_row(r, merged.block_weight);
  const char* origin = row_origin(args.running_out, work, work.head, query_begin, 4);
  const float* row =
      reinterpret_cast<const float*>(origin) + position * args.running_out.strides.row;
  add_row(out_[r / 2], r % 2, row, static_cast<int32_t>(args.head_dim), call_.running_aligned,
          merged.running_weight);
  return merged.lse;
}

/// In float32.
template <typename Element, typename Shape>
__device__ void ForwardWarp<Element, Shape>::store_rows(const WorkItem& work, int32_t rows,
                                                        int32_t query_begin) {
  const ForwardArgs& args = call_.args;
  char* origin = const_cast<char*>(row_origin(args.out, work, work.head, query_begin, 4));
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    if (row_index(r) < rows) {
      float* row = reinterpret_cast<float*>(origin) + row_position(r) * args.out.strides.row;
      store_row(out_[r / 2], r % 2, row, static_cast<int32_t>(args.head_dim), call_.out_aligned, 1);
    }
  }
}

/// threadIdx.x, read here and now: what follows from it is computed where it is used, not once at
/// the kernel's start to be kept in registers that the products need.
__device__ inline int thread_index_here() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

/// Through the query tile's memory, of which each warp uses its own rows, so that global stores are
/// whole rows.
template <typename Element, typename Shape>
__device__ void ForwardWarp<Element, Shape>::write_out(const WorkItem& work, int32_t rows,
                                                       int32_t query_begin) {
  const int thread = thread_index_here(), lane = thread % 32;
  const int first_row = thread / 32 * kTiles * 16;
  const int32_t head_dim = static_cast<int32_t>(call_.args.head_dim);
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
    for (int n = 0; n < kValueTiles; ++n) {
      *reinterpret_cast<uint32_t*>(memory_.query + Layout::offset(first_row + r * 8 + lane / 4, n) +
                                   lane % 4 * 4) =
          pack<Element>(out_[r / 2][n][r % 2 * 2], out_[r / 2][n][r % 2 * 2 + 1]);
    }
  }
  __syncwarp();
  const MutableRows& out = call_.args.out;
  char* origin = const_cast<char*>(row_origin(out, work, work.head, query_begin, 2));
  constexpr int kLanes = Shape::Query::kLanes;
  const int chunk_lane = lane % kLanes;
  for (int row = first_row + lane / kLanes; row < min(rows, first_row + kTiles * 16);
       row += 32 / kLanes) {
    char* to = origin + memory_.rows.position[row] * out.strides.row * 2;
    for (int chunk = chunk_lane; chunk * 8 < head_dim; chunk += kLanes) {
      const unsigned char* from = memory_.query + Layout::offset(row, chunk);
      if (call_.out_aligned) {
        *reinterpret_cast<int4*>(to + chunk * 16) = *reinterpret_cast<const int4*>(from);
      } else {
        for (int e = 0; e < 8 && chunk * 8 + e < head_dim; ++e) {
          reinterpret_cast<uint16_t*>(to)[chunk * 8 + e] =
              reinterpret_cast<const uint16_t*>(from)[e];
        }
      }
    }
  }
}

}  // namespace dilated::kernels::cuda::portable

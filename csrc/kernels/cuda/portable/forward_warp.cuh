// What one warp does in the 16-bit forward pass: scores, running softmax and output of its rows.
//
// A warp owns kWarpTiles * 16 rows. Scores and the output stay in registers as mma accumulators;
// the running softmax is in base 2 and float32. Exponents may be taken against any reference, as
// long as nothing overflows, so most key tiles keep the old one and skip the search for a maximum.
// If weights turn out too large for 16 bits, or the reference too large for scores that are scaled
// to base 2 in one step, the tile's scores are computed again, rounded as logits, and the reference
// follows their maximum.
//
// One class, since its steps share the accumulators.
#pragma once

#include "kernels/cuda/portable/shapes.h"
#include "kernels/cuda/primitives/float_row.cuh"
#include "kernels/cuda/primitives/forward_call.cuh"
#include "kernels/cuda/primitives/numerics.cuh"
#include "kernels/cuda/primitives/running.cuh"
#include "kernels/cuda/primitives/score.cuh"
#include "kernels/cuda/primitives/warp_tile.cuh"

namespace dilated::kernels::cuda::portable {

template <int kWidth_, int kWarps_, int kWarpTiles_>
struct ForwardShape {
  static constexpr int kWidth = kWidth_, kWarps = kWarps_, kWarpTiles = kWarpTiles_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRows = kWarps * kWarpTiles * 16;
  static constexpr ForwardTile kTile{kWidth, kRows};
  static constexpr int kKeys = kTile.keys();
  static constexpr int kSteps = kWidth / 16;  // of the product with the keys
  static constexpr bool kQueryInRegisters = kWarpTiles * kWidth <= 128;
  static constexpr int kLists = kTile.lists();
  // Warps on a multiprocessor that leave each thread the registers that it needs.
  static constexpr int kBlocks = (kWidth <= 64 && kWarpTiles == 1 ? 16 : 8) / kWarps;
  using Keys = RowTile<kWidth, kKeys, kThreads>;
  using Query = RowTile<kWidth, kRows, kThreads>;
  using Layout = typename Keys::Layout;
};

/// Shared memory of a block. Tiles are aligned to 128 bytes.
template <typename Shape>
struct ForwardMemory {
  alignas(128) unsigned char query[Shape::Query::kBytes];  // later the output
  alignas(128) unsigned char key[2][Shape::Keys::kBytes];
  alignas(128) unsigned char value[2][Shape::Keys::kBytes];
  KeyTile<Shape::kKeys> keys[Shape::kLists];  // being used, copied and listed
  RowTileList<Shape::kRows> rows;
  // What follows is here rather than in registers, which the products need.
  WorkItem work;
  int64_t item;
  const uint16_t* key_origin;  // of the work item's head, see RowSource
  const uint16_t* value_origin;
  int32_t key_tiles;    // of the work item
  Window all;           // keys that every row sees
  ColumnCursor cursor;  // warp 0's
};

/// One warp's part of a tile, in registers. r counts the rows of which a lane holds some columns: r
/// is row 8 * r + lane / 4 of the warp.
template <typename Element, typename Shape>
class ForwardWarp {
 public:
  static constexpr int kTiles = Shape::kWarpTiles, kWarpRows = 2 * kTiles;
  static constexpr int kKeyTiles = Shape::kKeys / 8, kValueTiles = Shape::kWidth / 8;
  using Layout = typename Shape::Layout;

  __device__ ForwardWarp(const ForwardCall& call, ForwardMemory<Shape>& memory)
      : call_(call), memory_(memory) {
    const int lane = threadIdx.x % 32;
    first_row_ = threadIdx.x / 32 * kTiles * 16;
    // left_offset and right_offset, written out: as calls they make width 128 spill.
    query_ = shared_address(memory.query) + Layout::offset(first_row_ + lane % 16, lane / 16);
    key_ = Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    value_ = Layout::offset(lane % 16, lane / 16);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      reference_[r] = negative_infinity();
      sum_[r] = 0;
    }
    set_zero(out_);
  }

  /// Once the query tile is in shared memory.
  __device__ void load_query() {
    if constexpr (Shape::kQueryInRegisters) {
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step) {
        load_left<Layout>(query_fragments_[step], query_, step);
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
    accumulate<Element, Layout>(out_, scores_, shared_address(memory_.value[stage]) + value_);
  }

  template <bool kIsBlock>
  __device__ void finish(const WorkItem& work, int32_t rows);

 private:
  __device__ void multiply_keys(uint32_t key) {
    if constexpr (!Shape::kQueryInRegisters) {
      multiply_rows<Element, Layout>(scores_, query_, key);
      return;
    }
    // Keys outside: the first scores are complete, and their exponentials can begin, while the last
    // are computed.
    set_zero(scores_);
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step) {
        multiply_rows_step<Element, Layout>(scores_, n, query_fragments_[step], key, step);
      }
    }
  }

  /// Scores to logits with their multiplicities, -inf where a row may not look.
  __device__ void apply_biases(const KeyTile<Shape::kKeys>& keys) {
    for_each_pair(scores_, [&](float* score, int, int n) {
      const float2 bias = pair_in(keys.bias, n);
      score[0] = logit_of(score[0], call_.args.scale, bias.x);
      score[1] = logit_of(score[1], call_.args.scale, bias.y);
    });
    if (!keys.is_masked) {
      return;
    }
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const Window window =
          window_of(memory_.rows, row_index(r), call_.args.is_causal, /*over_keys=*/false);
      for_each_pair_of_row(scores_, r, [&](float* score, int n) {
        const int2 position = pair_in(keys.position, n);
        score[0] = masked_logit(score[0], window, position.x);
        score[1] = masked_logit(score[1], window, position.y);
      });
    }
  }

  /// Scores become weights, exp(score * scale + bias - reference), by one multiply-add. sums: of
  /// this lane's part of each row.
  __device__ void weigh_scores(float bias_log2, float (&sums)[kWarpRows]) {
    float offset[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      offset[r] = quick_offset(finite(reference_[r]), bias_log2);
    }
    exponentiate(
        sums, [&](float score, int r) { return quick_weight(score, call_.scale_log2, offset[r]); });
  }

  /// Logits become weights; that of a row's reference is exactly 1.
  __device__ void weigh_logits(float (&sums)[kWarpRows]) {
    float base[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      base[r] = finite(reference_[r]);
    }
    exponentiate(sums, [&](float logit, int r) { return weight_of(logit, base[r]); });
  }

  template <typename Weight>
  __device__ void exponentiate(float (&sums)[kWarpRows], const Weight& weight) {
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      sums[r] = 0;
    }
    for_each_pair(scores_, [&](float* score, int r, int) {
      score[0] = weight(score[0], r);
      sums[r] += score[0];
      score[1] = weight(score[1], r);
      sums[r] += score[1];
    });
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
      float largest = pair_of(scores_, r, 0)[0];
#pragma unroll
      for (int i = 1; i < 2 * kKeyTiles; ++i) {
        largest = fmaxf(largest, pair_of(scores_, r, i / 2)[i % 2]);
      }
      const float reference = fmaxf(reference_[r], quad_max(largest));
      const float factor = rescaling(reference_[r], reference);
      reference_[r] = reference;
      sum_[r] *= factor;
      scale_row(out_, r, factor);
    }
  }

  /// Weights that dropout removes become zero; the sums keep them.
  __device__ void drop(const KeyTile<Shape::kKeys>& keys) {
    const uint32_t threshold = dropout_threshold(call_.args.dropout.probability);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const uint32_t key = row_dropout_key(call_.args, memory_.work, row_position(r));
      for_each_pair_of_row(scores_, r, [&](float* score, int n) {
        const int2 position = pair_in(keys.position, n);
        score[0] = dropout_keeps(key, position.x, threshold) ? score[0] : 0;
        score[1] = dropout_keeps(key, position.y, threshold) ? score[1] : 0;
      });
    }
  }

  __device__ float merge_row(int r, float lse, const WorkItem& work, int64_t head_row);
  __device__ void store_rows(const WorkItem& work, int32_t rows);
  __device__ void write_out(const WorkItem& work, int32_t rows);

  __device__ int row_index(int r) const { return first_row_ + r * 8 + threadIdx.x % 32 / 4; }
  __device__ int32_t row_position(int r) const { return memory_.rows.position[row_index(r)]; }

  static constexpr float kLargestSum = 32768, kLargestReference = 256;

  const ForwardCall& call_;
  ForwardMemory<Shape>& memory_;
  int first_row_;
  uint32_t query_, key_,
      value_;  // addresses, or offsets into a stage, of what this lane hands to ldmatrix
  uint32_t query_fragments_[Shape::kQueryInRegisters ? Shape::kSteps : 1][kTiles][4];
  Accumulators<kTiles, kKeyTiles> scores_;
  Accumulators<kTiles, kValueTiles> out_;
  float reference_[kWarpRows], sum_[kWarpRows];
};

/// Normalises, and writes the rows that exist: out rounded at most once, lse as natural logarithm.
/// kIsBlock: merges with a running result, if there is one, and leaves a partial result in float32.
/// Within the plain kernel that would slow its loop (docs/performance.md).
template <typename Element, typename Shape>
template <bool kIsBlock>
__device__ void ForwardWarp<Element, Shape>::finish(const WorkItem& work, int32_t rows) {
  const ForwardArgs& args = call_.args;
  const float zero_keys = static_cast<float>(work.group.zero_keys);
  const int64_t head_row =
      (work.batch * args.heads + work.head) * args.queries + work.tile.row_shift;
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    float sum = quad_sum(sum_[r]);
    float reference = reference_[r];
    const float factor = add_zero_keys(zero_keys, reference, sum);
    scale_row(out_, r, sum == 0 ? 0 : factor / (sum * (1 - args.dropout.probability)));
    float lse = sum == 0 ? negative_infinity() : reference + logf(sum);
    if constexpr (kIsBlock) {
      if (args.running_lse != nullptr) {
        lse = merge_row(r, lse, work, head_row);
      }
    }
    if (threadIdx.x % 4 == 0 && row_index(r) < rows) {
      static_cast<float*>(args.lse)[head_row + row_position(r)] = lse;
    }
  }
  if constexpr (kIsBlock) {
    if (args.is_partial) {
      store_rows(work, rows);
      return;
    }
  }
  write_out(work, rows);
}

/// Adds the running result of the row to its normalised output; the log-sum-exp of both.
template <typename Element, typename Shape>
__device__ float ForwardWarp<Element, Shape>::merge_row(int r, float lse, const WorkItem& work,
                                                        int64_t head_row) {
  const ForwardArgs& args = call_.args;
  const int32_t position = row_position(r);
  const float running_lse = static_cast<const float*>(args.running_lse)[head_row + position];
  if (running_lse == negative_infinity()) {
    return lse;
  }
  const Merged merged = merge(running_lse, lse);
  scale_row(out_, r, merged.block_weight);
  const Rows& running = args.running_out;
  const float* row = row_at<float>(running, work.batch, work.tile.row_shift, work.head) +
                     position * running.strides.row;
  add_row(out_[r / 2], r % 2, row, static_cast<int32_t>(args.head_dim), running.is_aligned,
          merged.running_weight);
  return merged.lse;
}

/// In float32.
template <typename Element, typename Shape>
__device__ void ForwardWarp<Element, Shape>::store_rows(const WorkItem& work, int32_t rows) {
  const ForwardArgs& args = call_.args;
  auto* origin = row_at<float>(args.out, work.batch, work.tile.row_shift, work.head);
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    if (row_index(r) < rows) {
      float* row = origin + row_position(r) * args.out.strides.row;
      store_row(out_[r / 2], r % 2, row, static_cast<int32_t>(args.head_dim), args.out.is_aligned,
                1);
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
__device__ void ForwardWarp<Element, Shape>::write_out(const WorkItem& work, int32_t rows) {
  const int thread = thread_index_here(), lane = thread % 32;
  const int first_row = thread / 32 * kTiles * 16;
  const int32_t head_dim = static_cast<int32_t>(call_.args.head_dim);
  __syncwarp();
  store_rounded<Element, Layout>(memory_.query, first_row, 0, out_, 1, lane);
  __syncwarp();
  const MutableRows& out = call_.args.out;
  auto* origin = row_at<uint16_t>(out, work.batch, work.tile.row_shift, work.head);
  write_rows<Layout, Shape::Query::kLanes, 32>(
      memory_.query, first_row, min(rows, first_row + kTiles * 16), lane, head_dim, out.is_aligned,
      [&](int row) { return origin + memory_.rows.position[row] * out.strides.row; });
}

}  // namespace dilated::kernels::cuda::portable

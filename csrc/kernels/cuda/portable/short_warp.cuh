// What the one warp of a short tile does in the 16-bit forward pass, for 16 rows.
//
// Everything is transposed, S^T = K Q^T and O^T += V^T P^T, so that rows are the narrow side of the
// products, 8 at a time, and those 8 meet 16 keys at a time only where they see some. The softmax
// is as in forward_warp.cuh.
//
// One class, since its steps share the accumulators.
#pragma once

#include "kernels/cuda/portable/forward_warp.cuh"

namespace dilated::kernels::cuda::portable {

/// r counts the rows of which a lane holds some keys: r is row 8 * (r / 2) + lane % 4 * 2 + r % 2.
/// Of a block, scores 0 and 1 are of key lane / 4 and two rows, 2 and 3 of the key 8 further.
template <typename Element, typename Shape>
class ShortForwardWarp {
 public:
  static constexpr int kRowBlocks = 2, kRows = 2 * kRowBlocks;  // rows of a lane
  static constexpr int kKeyBlocks = Shape::kKeys / 16, kWidthTiles = Shape::kWidth / 16;
  static_assert(Shape::kRows == 8 * kRowBlocks && Shape::kWarps == 1);
  static_assert(ShortKeys::kRows == 8 && ShortKeys::kKeys == 16);
  using Layout = typename Shape::Layout;
  using Keys = KeyTile<Shape::kKeys>;

  __device__ ShortForwardWarp(const ForwardCall& call, ForwardMemory<Shape>& memory)
      : call_(call), memory_(memory) {
    const int lane = threadIdx.x % 32;
    key_ = left_offset<Layout>(0, lane);
    value_ = right_offset<Layout>(lane);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      reference_[r] = negative_infinity();
      sum_[r] = 0;
    }
    set_zero(out_);
  }

  /// Once the query tile is in shared memory.
  __device__ void load_query() {
    const uint32_t query =
        shared_address(memory_.query) + right_offset<Layout>(static_cast<int>(threadIdx.x % 32));
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
      load_matrices(query_[step], Layout::advance(query, step));
    }
  }

  /// The keys and values in `stage`. On the way, the rows' references follow their maxima only
  /// where they must.
  __device__ void attend(int stage, const Keys& keys, Blocks blocks, bool is_first) {
    const uint32_t key = shared_address(memory_.key[stage]) + key_;
    float sums[kRows];
    bool done = false;
    if (keys.is_plain && !is_first) {
      multiply_keys(key, blocks);
      weigh_scores(keys.plain_bias_log2, blocks, sums);
      done = fit(sums, blocks);
    }
    if (!done) {
      multiply_keys(key, blocks);
      apply_biases(keys, blocks);
      move_references(blocks);
      weigh_logits(blocks, sums);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sum_[r] += sums[r];
    }
    if (call_.args.dropout.probability > 0) {
      drop(keys, blocks);
    }
    accumulate_values(shared_address(memory_.value[stage]) + value_, blocks);
  }

  template <bool kIsBlock>
  __device__ void finish(const WorkItem& work, int32_t rows);

 private:
  __device__ static bool has(Blocks blocks, int m, int n) {
    return (blocks >> (kRowBlocks * m + n) & 1) != 0;
  }
  __device__ static bool has_keys(Blocks blocks, int m) {
    return (blocks >> (kRowBlocks * m) & ((1 << kRowBlocks) - 1)) != 0;
  }
  __device__ static bool has_row(Blocks blocks, int r) {
    bool has_any = false;
#pragma unroll
    for (int m = 0; m < kKeyBlocks; ++m) {
      has_any = has_any || has(blocks, m, r / 2);
    }
    return has_any;
  }

  /// Calls visit(score, r, key) for the scores of the blocks.
  template <typename Visit>
  __device__ void for_each_score(Blocks blocks, const Visit& visit) {
#pragma unroll
    for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < kRowBlocks; ++n) {
        if (has(blocks, m, n)) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            visit(scores_[m][n][i], 2 * n + i % 2, 16 * m + i / 2 * 8 + threadIdx.x % 32 / 4);
          }
        }
      }
    }
  }

  __device__ void multiply_keys(uint32_t key, Blocks blocks) {
    set_zero(scores_);
#pragma unroll
    for (int m = 0; m < kKeyBlocks; ++m) {
      if (!has_keys(blocks, m)) {
        continue;
      }
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step) {
        uint32_t a[4];
        load_matrices(a, Layout::advance(key, step) + m * 16 * Layout::kRowBytes);
#pragma unroll
        for (int n = 0; n < kRowBlocks; ++n) {
          if (has(blocks, m, n)) {
            mma_16x8x16<Element>(scores_[m][n], a, query_[step][2 * n], query_[step][2 * n + 1]);
          }
        }
      }
    }
  }

  /// Scores to logits with their multiplicities, -inf where a row may not look.
  __device__ void apply_biases(const Keys& keys, Blocks blocks) {
    for_each_score(blocks, [&](float& score, int, int key) {
      score = logit_of(score, call_.args.scale, keys.bias[key]);
    });
    if (!keys.is_masked) {
      return;
    }
    Window windows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      windows[r] = window_of(memory_.rows, row_index(r), call_.args.is_causal, /*over_keys=*/false);
    }
    for_each_score(blocks, [&](float& score, int r, int key) {
      score = masked_logit(score, windows[r], keys.position[key]);
    });
  }

  /// Scores become weights, exp(score * scale + bias - reference), by one multiply-add. sums: of
  /// this lane's part of each row.
  __device__ void weigh_scores(float bias_log2, Blocks blocks, float (&sums)[kRows]) {
    float offset[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      offset[r] = quick_offset(finite(reference_[r]), bias_log2);
    }
    exponentiate(blocks, sums, [&](float score, int r) {
      return quick_weight(score, call_.scale_log2, offset[r]);
    });
  }

  /// Logits become weights; that of a row's reference is exactly 1.
  __device__ void weigh_logits(Blocks blocks, float (&sums)[kRows]) {
    exponentiate(blocks, sums,
                 [&](float logit, int r) { return weight_of(logit, finite(reference_[r])); });
  }

  template <typename Weight>
  __device__ void exponentiate(Blocks blocks, float (&sums)[kRows], const Weight& weight) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sums[r] = 0;
    }
    for_each_score(blocks, [&](float& score, int r, int) {
      score = weight(score, r);
      sums[r] += score;
    });
  }

  /// As ForwardWarp::fit.
  __device__ bool fit(const float (&sums)[kRows], Blocks blocks) const {
    bool fits = true;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      fits = fits && !(sums[r] > kLargestSum) &&
             (!has_row(blocks, r) || fabsf(reference_[r]) <= kLargestReference);
    }
    return __all_sync(kAllLanes, fits);
  }

  /// The scores are logits.
  __device__ void move_references(Blocks blocks) {
    float largest[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      largest[r] = negative_infinity();
    }
    for_each_score(blocks,
                   [&](float& score, int r, int) { largest[r] = fmaxf(largest[r], score); });
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (has_row(blocks, r)) {
        const float reference = fmaxf(reference_[r], column_max(largest[r]));
        const float factor = rescaling(reference_[r], reference);
        reference_[r] = reference;
        sum_[r] *= factor;
        scale_out(r, factor);
      }
    }
  }

  __device__ void scale_out(int r, float factor) {
#pragma unroll
    for (int d = 0; d < kWidthTiles; ++d) {
      out_[d][r / 2][r % 2] *= factor;
      out_[d][r / 2][2 + r % 2] *= factor;
    }
  }

  /// Weights that dropout removes become zero; the sums keep them.
  __device__ void drop(const Keys& keys, Blocks blocks) {
    const uint32_t threshold = dropout_threshold(call_.args.dropout.probability);
    uint32_t hashes[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      hashes[r] = row_dropout_key(call_.args, memory_.work, row_position(r));
    }
    for_each_score(blocks, [&](float& score, int r, int key) {
      score = dropout_keeps(hashes[r], keys.position[key], threshold) ? score : 0;
    });
  }

  /// O^T += V^T P^T.
  __device__ void accumulate_values(uint32_t value, Blocks blocks) {
#pragma unroll
    for (int m = 0; m < kKeyBlocks; ++m) {
      if (!has_keys(blocks, m)) {
        continue;
      }
      uint32_t weights[kRowBlocks][2];
#pragma unroll
      for (int n = 0; n < kRowBlocks; ++n) {
        if (has(blocks, m, n)) {
          transpose_pairs<Element>(weights[n], scores_[m][n]);
        }
      }
#pragma unroll
      for (int d = 0; d < kWidthTiles; ++d) {
        uint32_t a[4];
        load_matrices_transposed(a, Layout::advance(value, d) + m * 16 * Layout::kRowBytes);
#pragma unroll
        for (int n = 0; n < kRowBlocks; ++n) {
          if (has(blocks, m, n)) {
            mma_16x8x16<Element>(out_[d][n], a, weights[n][0], weights[n][1]);
          }
        }
      }
    }
  }

  /// Calls visit(element of out, column) for a row's columns of which this lane has one.
  template <typename Visit>
  __device__ void for_each_column(int r, const Visit& visit) {
    const auto head_dim = static_cast<int32_t>(call_.args.head_dim);
#pragma unroll
    for (int i = 0; i < 2 * kWidthTiles; ++i) {
      const int32_t column = i * 8 + static_cast<int32_t>(threadIdx.x % 32 / 4);
      if (column < head_dim) {
        visit(out_[i / 2][r / 2][i % 2 * 2 + r % 2], column);
      }
    }
  }

  __device__ float merge_row(int r, float lse, const WorkItem& work, int64_t head_row);
  __device__ void store_rows(const WorkItem& work, int32_t rows);
  __device__ void write_out(const WorkItem& work, int32_t rows);

  __device__ static int row_index(int r) {
    return r / 2 * 8 + static_cast<int>(threadIdx.x % 4) * 2 + r % 2;
  }
  __device__ int32_t row_position(int r) const { return memory_.rows.position[row_index(r)]; }

  const ForwardCall& call_;
  ForwardMemory<Shape>& memory_;
  uint32_t key_, value_;  // offsets into a stage of what this lane hands to ldmatrix
  uint32_t query_[Shape::kSteps][4];
  Accumulators<kKeyBlocks, kRowBlocks> scores_;
  Accumulators<kWidthTiles, kRowBlocks> out_;
  float reference_[kRows], sum_[kRows];
};

/// As ForwardWarp::finish.
template <typename Element, typename Shape>
template <bool kIsBlock>
__device__ void ShortForwardWarp<Element, Shape>::finish(const WorkItem& work, int32_t rows) {
  const ForwardArgs& args = call_.args;
  const float zero_keys = static_cast<float>(work.group.zero_keys);
  const int64_t head_row =
      (work.batch * args.heads + work.head) * args.queries + work.tile.row_shift;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float sum = column_sum(sum_[r]);
    float reference = reference_[r];
    const float factor = add_zero_keys(zero_keys, reference, sum);
    scale_out(r, sum == 0 ? 0 : factor / (sum * (1 - args.dropout.probability)));
    float lse = sum == 0 ? negative_infinity() : reference + logf(sum);
    if constexpr (kIsBlock) {
      if (args.running_lse != nullptr) {
        lse = merge_row(r, lse, work, head_row);
      }
    }
    if (threadIdx.x % 32 < 4 && row_index(r) < rows) {
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
__device__ float ShortForwardWarp<Element, Shape>::merge_row(int r, float lse, const WorkItem& work,
                                                             int64_t head_row) {
  const ForwardArgs& args = call_.args;
  const int32_t position = row_position(r);
  const float running_lse = static_cast<const float*>(args.running_lse)[head_row + position];
  if (running_lse == negative_infinity()) {
    return lse;
  }
  const Merged merged = merge(running_lse, lse);
  const Rows& running = args.running_out;
  const float* row = row_at<float>(running, work.batch, work.tile.row_shift, work.head) +
                     position * running.strides.row;
  for_each_column(r, [&](float& element, int32_t column) {
    element = fmaf(merged.running_weight, row[column], element * merged.block_weight);
  });
  return merged.lse;
}

/// In float32.
template <typename Element, typename Shape>
__device__ void ShortForwardWarp<Element, Shape>::store_rows(const WorkItem& work, int32_t rows) {
  const ForwardArgs& args = call_.args;
  auto* origin = row_at<float>(args.out, work.batch, work.tile.row_shift, work.head);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (row_index(r) < rows) {
      float* row = origin + row_position(r) * args.out.strides.row;
      for_each_column(r, [&](float element, int32_t column) { row[column] = element; });
    }
  }
}

/// Through the query tile's memory, so that global stores are whole rows.
template <typename Element, typename Shape>
__device__ void ShortForwardWarp<Element, Shape>::write_out(const WorkItem& work, int32_t rows) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int d = 0; d < kWidthTiles; ++d) {
#pragma unroll
    for (int n = 0; n < kRowBlocks; ++n) {
      uint32_t pairs[2];
      transpose_pairs<Element>(pairs, out_[d][n]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<uint32_t*>(memory_.query + Layout::offset(n * 8 + lane / 4, 2 * d + i) +
                                     lane % 4 * 4) = pairs[i];
      }
    }
  }
  __syncwarp();
  const MutableRows& out = call_.args.out;
  auto* origin = row_at<uint16_t>(out, work.batch, work.tile.row_shift, work.head);
  write_rows<Layout, Shape::Query::kLanes, 32>(
      memory_.query, 0, rows, lane, static_cast<int32_t>(call_.args.head_dim), out.is_aligned,
      [&](int row) { return origin + memory_.rows.position[row] * out.strides.row; });
}

}  // namespace dilated::kernels::cuda::portable

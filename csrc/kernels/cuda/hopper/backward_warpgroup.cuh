// What a warpgroup does with its 64 rows of keys, 16 a warp, for each tile of queries:
//
//   S^T = K Q^T, P^T = multiplicity * exp(S^T - lse), dP^T = V dO^T, dS^T = P^T (dP^T - delta)
//   grad_value += P^T dO, grad_key += dS^T Q; grad_query += dS K, of which each warpgroup sums a
//   half, over the keys of both
//
// P^T and dS^T stay in registers as operands; dS^T goes through shared memory as well.
#pragma once

#include "kernels/cuda/hopper/backward_memory.cuh"
#include "kernels/cuda/hopper/group_rows.cuh"
#include "kernels/cuda/primitives/reduce_add.cuh"
#include "kernels/cuda/primitives/score.cuh"
#include "kernels/cuda/primitives/warp_tile.cuh"

namespace dilated::kernels::cuda::hopper {

/// Four 8 x 8 matrices of 16-bit elements to shared memory; lane l gives the address of row l % 8
/// of matrix l / 8.
__device__ inline void store_matrices(uint32_t row_address, const uint32_t (&matrices)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
      "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
      : "memory");
}

template <typename Element, typename Shape>
class BackwardWarpgroup {
 public:
  __device__ BackwardWarpgroup(const BackwardCall& call, BackwardMemory<Shape>& memory)
      : call_(call), memory_(memory), group_(threadIdx.x / 128 - 1) {}

  /// All tiles of the block.
  __device__ void run() {
    Turn items{Shape::kItems};
#pragma unroll 1
    for (;;) {
      Handover& item = memory_.item_turns[items.index];
      item.full.wait(items.full_parity());
      item_ = &memory_.items[items.index];
      if (item_->is_last) {
        return;
      }
      Handover& rows = memory_.row_turns[rows_.index];
      rows.full.wait(rows_.full_parity());
      set_zero(grad_key_);
      set_zero(grad_value_);
#pragma unroll 1
      for (int32_t tiles = item_->column_tiles; tiles > 0; --tiles) {
        attend();
      }
      finish();
      release(rows);
      release(item);
      rows_.advance();
      items.advance();
    }
  }

 private:
  static constexpr int kColumnTiles = Shape::kColumns / 8, kSteps = Shape::kColumns / 16;
  using Scores = Accumulators<1, kColumnTiles>;

  __device__ static void release(Handover& handover) {
    if (threadIdx.x % 32 == 0) {
      handover.empty.arrive();
    }
  }

  /// Begins products = rows times columns, transposed.
  __device__ static void multiply(Scores& products, const unsigned char* rows,
                                  const unsigned char* columns) {
    begin_scores<Element, Shape::kWidth>(products[0], describe(shared_address(rows)),
                                         describe(shared_address(columns)));
  }

  /// Begins sums += weights times columns.
  template <typename Sums>
  __device__ static void accumulate(Sums& sums, const uint32_t (&weights)[kSteps][1][4],
                                    const unsigned char* columns) {
    begin_sums<Element>(sums[0], weights,
                        describe(shared_address(columns), Shape::kColumnPanelBytes));
  }

  /// A tile of queries.
  __device__ void attend() {
    const int stage = stages_.index;
    Handover& queries = memory_.query_turns[stage];
    Handover& gradients = memory_.grad_out_turns[stage];
    unsigned char* key = memory_.key[rows_.index][group_];
    unsigned char* value = memory_.value[rows_.index][group_];
    Scores weights, scores;
    uint32_t packed_weights[kSteps][1][4], packed_scores[kSteps][1][4];
    // Two products under way take more registers than wide rows leave.
    constexpr bool kAtOnce = Shape::kPanels == 1;
    queries.full.wait(stages_.full_parity());
    multiply(weights, key, memory_.query[stage]);
    if constexpr (kAtOnce) {
      gradients.full.wait(stages_.full_parity());
      multiply(scores, value, memory_.grad_out[stage]);
    }
    wait_for_products<kAtOnce ? 1 : 0>();
    weigh(weights, stage);
    if constexpr (!kAtOnce) {
      gradients.full.wait(stages_.full_parity());
      multiply(scores, value, memory_.grad_out[stage]);
    }
    wait_for_products<0>();
    if (call_.args.dropout.probability > 0) [[unlikely]] {
      drop(weights, scores, stage);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      differentiate(weights, scores, stage, step);
      pack_kept(packed_weights[step][0], weights, step);
      pack_left<Element>(packed_scores[step], scores, step);
      store_scores(packed_scores[step][0], step);
    }
    accumulate(grad_value_, packed_weights, memory_.grad_out[stage]);
    publish_to_async_proxy();
    sync_threads(kScoresAreWritten, 256);
    Accumulators<1, Shape::kSumColumns / 8> grad_query;
    multiply_scores(grad_query);
    wait_for_products<1>();
    release(gradients);
    accumulate(grad_key_, packed_scores, memory_.query[stage]);
    wait_for_products<1>();
    add_grad_query(grad_query, stage);
    wait_for_products<0>();
    __syncwarp();
    release(queries);
    stages_.advance();
  }

  /// Scores to weights.
  __device__ void weigh(Scores& weights, int stage) {
    const auto& list = memory_.lists[stage];
    if (list.is_large) [[unlikely]] {
      for_each_pair(weights, [&](float* weight, int, int n) {
        const float2 bias = pair_in(list.bias, n), lse = pair_in(list.lse, n);
        weight[0] = softmax_weight(logit_of(weight[0], call_.args.scale, bias.x), lse.x);
        weight[1] = softmax_weight(logit_of(weight[1], call_.args.scale, bias.y), lse.y);
      });
    } else {
      for_each_pair(weights, [&](float* weight, int, int n) {
        const float2 offset = pair_in(list.offset, n);
        weight[0] = quick_weight(weight[0], call_.scale_log2, offset.x);
        weight[1] = quick_weight(weight[1], call_.scale_log2, offset.y);
      });
    }
    if (list.is_masked[group_] != 0) {
      mask(weights, list);
    }
  }

  /// Weights of queries that a key does not see become 0.
  __device__ void mask(Scores& weights, const QuerySlots<Shape::kSlots>& list) {
    const Window seen[2]{seen_window(0), seen_window(1)};
    for_each_pair(weights, [&](float* weight, int r, int n) {
      const Slot& slot = list.slots[n / 2];
      const int32_t column = slot.first + slot.stride * (n % 2 * 8 + threadIdx.x % 4 * 2);
      weight[0] = masked_weight(weight[0], seen[r], column);
      weight[1] = masked_weight(weight[1], seen[r], column + slot.stride);
    });
  }

  /// scores: dP^T to dS^T, 16 queries of it.
  __device__ void differentiate(const Scores& weights, Scores& scores, int stage, int step) {
    const float* delta = memory_.delta[stage];
#pragma unroll
    for (int n = 2 * step; n < 2 * step + 2; ++n) {
      const float2 deltas = pair_in(delta, n);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float* score = pair_of(scores, r, n);
        const float* weight = pair_of(weights, r, n);
        score[0] = score_gradient(fabsf(weight[0]), score[0], deltas.x);
        score[1] = score_gradient(fabsf(weight[1]), score[1], deltas.y);
      }
    }
  }

  /// Scores are what dropout leaves of them; weights that it removes get a sign, as dS takes them
  /// all and grad_value those that are kept.
  __device__ void drop(Scores& weights, Scores& scores, int stage) {
    const auto& list = memory_.lists[stage];
    const uint32_t threshold = dropout_threshold(call_.args.dropout.probability);
    const float factor = kept_factor();
    const int32_t position[2]{row_position(0), row_position(1)};
    for_each_pair(weights, [&](float* weight, int r, int n) {
      const uint2 keys = pair_in(list.dropout_key, n);
      float* score = pair_of(scores, r, n);
      const bool is_kept[2]{dropout_keeps(keys.x, position[r], threshold),
                            dropout_keeps(keys.y, position[r], threshold)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        weight[i] = is_kept[i] ? weight[i] : -weight[i];
        score[i] = is_kept[i] ? score[i] * factor : 0;
      }
    });
  }
  __device__ float kept_factor() const { return 1 / (1 - call_.args.dropout.probability); }

  /// Of weights with a sign, 0.
  __device__ static void pack_kept(uint32_t (&packed)[4], const Scores& weights, int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = pair_of(weights, i % 2, 2 * step + i / 2);
      packed[i] = pack_positive<Element>(pair[0], pair[1]);
    }
  }

  /// dS^T, 16 queries of the warp's rows.
  __device__ void store_scores(const uint32_t (&packed)[4], int step) {
    const int lane = threadIdx.x % 32;
    const int row = group_ * Shape::kGroupRows + threadIdx.x / 32 % 4 * 16 + lane % 16;
    store_matrices(shared_address(memory_.scores[stages_.index]) +
                       Swizzle<8>::offset(row, step * 2 + lane / 16),
                   packed);
  }

  /// Begins sums = dS K: over the keys of both warpgroups.
  template <typename Sums>
  __device__ void multiply_scores(Sums& sums) {
    const int offset =
        group_ * (Shape::kPanels == 2 ? Shape::kRowPanelBytes : Shape::kSumColumns * 2);
    const uint64_t left = describe(shared_address(memory_.scores[stages_.index]));
    const uint64_t right[2]{describe(shared_address(memory_.key[rows_.index][0]) + offset),
                            describe(shared_address(memory_.key[rows_.index][1]) + offset)};
    begin_products();
#pragma unroll
    for (int step = 0; step < Shape::kRows / 16; ++step) {
      constexpr int kStepBytes = 16 * kPanelRowBytes / 16;
      Product<Element, Shape::kSumColumns>::transposed(
          sums[0], left + step * kStepBytes, right[step / 4] + step % 4 * kStepBytes, step > 0);
    }
    commit_products();
  }

  /// To the sums in memory; see QuerySums.
  template <typename Sums>
  __device__ void add_grad_query(const Sums& sums, int stage) {
    const auto& list = memory_.lists[stage];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int first_column = group_ * Shape::kSumColumns;
    const Slot slot = list.slots[warp];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = r * 8 + lane / 4;
      if (row < slot.empty) {
        continue;
      }
      float* to = call_.grad_query.row(list.row[warp] + int64_t{slot.stride} * row) + first_column +
                  lane % 4 * 4;
#pragma unroll
      for (int n = 0; n < Shape::kSumColumns / 8; n += 2) {
        const float *low = pair_of(sums, r, n), *high = pair_of(sums, r, n + 1);
        if (first_column + n * 8 < call_.grad_query.width) {
          reduce_add_4(to + n * 8, {low[0], low[1], high[0], high[1]});
        }
      }
    }
  }

  __device__ int32_t row_position(int r) const {
    return item_->rows.position[group_ * Shape::kGroupRows + group_row(r)];
  }
  __device__ Window seen_window(int r) const {
    return memory_.seen[rows_.index][group_ * Shape::kGroupRows + group_row(r)];
  }

  __device__ void finish();
  template <typename Gradient>
  __device__ void write(const MutableRows& out, const Gradient& gradient, float factor,
                        unsigned char* buffer);

  static constexpr int kScoresAreWritten = 1, kRowsAreRead = 2;

  const BackwardCall& call_;
  BackwardMemory<Shape>& memory_;
  const int group_;
  const typename Shape::RowItem* item_;
  Turn stages_{Shape::kStages};
  Turn rows_{Shape::kRowBuffers};
  Accumulators<1, Shape::kWidth / 8> grad_key_, grad_value_;
};

/// Writes grad_key and grad_value.
template <typename Element, typename Shape>
__device__ void BackwardWarpgroup<Element, Shape>::finish() {
  if (!call_.args.is_partial) {
    sync_threads(kRowsAreRead, 256);  // the keys, of which each warpgroup reads all
  }
  write(call_.args.grad_key, grad_key_, call_.args.scale, memory_.key[rows_.index][group_]);
  write(call_.args.grad_value, grad_value_, kept_factor(), memory_.value[rows_.index][group_]);
  __syncwarp();
}

/// Through the buffer, unless as they are.
template <typename Element, typename Shape>
template <typename Gradient>
__device__ void BackwardWarpgroup<Element, Shape>::write(const MutableRows& out,
                                                         const Gradient& gradient, float factor,
                                                         unsigned char* buffer) {
  const int first_row = group_ * Shape::kGroupRows;
  const GroupRows to{out, item_->work, item_->rows.position + first_row,
                     item_->rows.count - first_row, call_.args.head_dim};
  if (call_.args.is_partial) {
    write_floats(to, gradient, factor);
  } else {
    write_rounded<Element, 2>(to, gradient, factor, buffer);
  }
}

}  // namespace dilated::kernels::cuda::hopper

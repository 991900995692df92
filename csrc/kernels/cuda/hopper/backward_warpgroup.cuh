// What a warpgroup does with its 64 rows of keys, 16 a warp, for each tile of queries:
//
//   S^T = K Q^T, P^T = multiplicity * exp(S^T - lse), dP^T = V dO^T, dS^T = P^T (dP^T - delta)
//   grad_value += P^T dO, grad_key += dS^T Q; grad_query += dS K, of which each warpgroup sums a
//   half, of the queries or of their columns, over the keys of both
//
// P^T and dS^T stay in registers as operands; dS^T goes through shared memory as well.
#pragma once

#include "kernels/cuda/hopper/backward_memory.cuh"
#include "kernels/cuda/hopper/backward_sums.cuh"
#include "kernels/cuda/hopper/group_rows.cuh"
#include "kernels/cuda/primitives/score.cuh"
#include "kernels/cuda/primitives/warp_tile.cuh"

namespace dilated::kernels::cuda::hopper {

template <typename Element, typename Shape>
class BackwardWarpgroup {
 public:
  __device__ BackwardWarpgroup(const BackwardCall& call, BackwardMemory<Shape>& memory)
      : call_(call), memory_(memory), group_(computing_group()) {}

  /// All tiles of the block.
  __device__ void run() {
    Turn items{Shape::kItems};
#pragma unroll 1
    for (;;) {
      Handover& item = memory_.item_turns[items.index];
      item.full.wait(items.full_parity());
      item_ = &memory_.items[items.index];
      if (item_->sharing == Sharing::kLast) {
        wait_for_sum_reads();
        return;
      }
      Handover& rows = memory_.row_turns[rows_.index];
      rows.full.wait(rows_.full_parity());
      set_zero(grad_key_);
      set_zero(grad_value_);
#pragma unroll 1
      for (int32_t tiles = item_->columns[0].tiles; tiles > 0; --tiles) {
        attend();
      }
      release(rows);
      finish();
      release(item);
      rows_.advance();
      items.advance();
    }
  }

 private:
  // A product's columns are a part of the tile: 64 queries.
  static constexpr int kParts = Shape::kParts, kTiles = kPanelColumns / 8, kSteps = kTiles / 2;
  using Scores = Accumulators<1, kTiles>;
  using Operands = uint32_t[kSteps][1][4];
  using Quads = float4[kSteps];  // of a part, a number for each of this lane's columns

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

  /// Begins sums += weights times columns of a part.
  template <typename Sums>
  __device__ static void accumulate(Sums& sums, const Operands& weights,
                                    const unsigned char* columns) {
    begin_sums<Element>(sums[0], weights,
                        describe(shared_address(columns), Shape::kColumnPanelBytes));
  }

  /// Of a tile in shared memory, where the part's columns begin.
  __device__ static const unsigned char* part_of(const unsigned char* columns, int part) {
    return columns + part * kPanelColumns * kPanelRowBytes;
  }

  __device__ static void load(Quads& quads, const float* list) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      quads[step] = quad_in(list, step);
    }
  }

  /// A tile of queries. The products of one part run beside the exponentials of the other.
  __device__ void attend() {
    const int stage = stages_.index;
    Handover& queries = memory_.query_turns[stage];
    Handover& gradients = memory_.grad_out_turns[stage];
    const unsigned char* key = memory_.key[rows_.index][group_];
    const unsigned char* value = memory_.value[rows_.index][group_];
    const unsigned char* query = memory_.query[stage];
    const unsigned char* grad_out = memory_.grad_out[stage];
    Scores weights[kParts], scores[kParts];
    Operands packed_weights[kParts], packed_scores[kParts];
    queries.full.wait(stages_.full_parity());
    const TileKind kind{__shfl_sync(kAllLanes, memory_.lists[stage].kind[group_].bits, 0)};
    multiply(weights[0], key, query);
    const auto multiply_others = [&] {
      gradients.full.wait(stages_.full_parity());
      multiply(scores[0], value, grad_out);
      if constexpr (kParts == 2) {
        multiply(weights[1], key, part_of(query, 1));
      }
    };
    if (kind.bits == 0) {
      multiply_others();
      Quads offsets;  // read beside the products, not before the second one
      load(offsets, memory_.lists[stage].offset);
      wait_for_products<kParts>();
      weigh(weights[0], offsets, call_.scale_log2);
    } else {  // takes registers, for which the other products have to wait
      wait_for_products<0>();
      weigh_carefully(weights[0], kind, stage, 0);
      multiply_others();
    }
    Quads deltas;
    load(deltas, memory_.delta[stage]);
    wait_for_products<kParts - 1>();
    differentiate(weights[0], scores[0], deltas, packed_weights[0], packed_scores[0], stage, 0);
    if constexpr (kParts == 2) {
      multiply(scores[1], value, part_of(grad_out, 1));
      accumulate(grad_value_, packed_weights[0], grad_out);
      wait_for_products<2>();
      weigh_carefully(weights[1], kind, stage, 1);
      load(deltas, memory_.delta[stage] + kPanelColumns);
      wait_for_products<1>();
      differentiate(weights[1], scores[1], deltas, packed_weights[1], packed_scores[1], stage, 1);
    }
    accumulate(grad_value_, packed_weights[kParts - 1], part_of(grad_out, kParts - 1));
    publish_to_async_proxy();
    wait_for_sum_reads();  // of the tile before: its buffer is written again after this
    sync_threads(kScoresAreWritten, 256);
    Accumulators<1, Shape::kSumColumns / 8> grad_query;
    multiply_scores(grad_query);
    wait_for_products<1>();
    release(gradients);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      accumulate(grad_key_, packed_scores[part], part_of(query, part));
    }
    const SumTarget target = sum_target(stage);
    wait_for_products<kParts>();
    if constexpr (Shape::kSumBytes == 0) {
      sync_threads(kPartIsRead + group_, 128);
    }
    add_grad_query(grad_query, target, stage);
    wait_for_products<0>();
    __syncwarp();
    release(queries);
    stages_.advance();
  }

  /// Scores to weights.
  __device__ void weigh_carefully(Scores& weights, TileKind kind, int stage, int part) {
    if (kind.is_large()) [[unlikely]] {
      subtract_lse(weights, stage, part);
    }
    Quads offsets;
    load(offsets, memory_.lists[stage].offset + part * kPanelColumns);
    weigh(weights, offsets, kind.is_large() ? kLog2E : call_.scale_log2);
    if (kind.is_masked(part)) {
      mask(weights, stage, part);
    }
  }
  __device__ static void weigh(Scores& weights, const Quads& offsets, float scale_log2) {
    for_each_pair(weights, [&](float* weight, int, int n) {
      const float2 offset = half_of(offsets[n / 2], n % 2);
      weight[0] = quick_weight(weight[0], scale_log2, offset.x);
      weight[1] = quick_weight(weight[1], scale_log2, offset.y);
    });
  }

  /// Scores to logits less their lse, where offsets would lose it; those are 0.
  __device__ void subtract_lse(Scores& scores, int stage, int part) {
    const auto& list = memory_.lists[stage];
    for_each_pair(scores, [&](float* score, int, int n) {
      const float2 bias = pair_in(list.bias, part * kTiles + n);
      const float2 lse = pair_in(list.lse, part * kTiles + n);
      score[0] = softmax_logit(logit_of(score[0], call_.args.scale, bias.x), lse.x);
      score[1] = softmax_logit(logit_of(score[1], call_.args.scale, bias.y), lse.y);
    });
  }

  /// Weights of queries that a key does not see become 0. Row by row, as registers are few.
  __device__ void mask(Scores& weights, int stage, int part) {
    const Slot* slots = memory_.lists[stage].slots + part * kPartSlots;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Window seen = seen_window(r);
      for_each_pair_of_row(weights, r, [&](float* weight, int n) {
        const Slot& slot = slots[n / 2];
        const int32_t column = slot.first + slot.stride * (n % 2 * 8 + threadIdx.x % 4 * 2);
        weight[0] = masked_weight(weight[0], seen, column);
        weight[1] = masked_weight(weight[1], seen, column + slot.stride);
      });
    }
  }

  /// From weights and dP^T to operands, and dS^T to shared memory.
  __device__ void differentiate(Scores& weights, Scores& scores, const Quads& deltas,
                                Operands& packed_weights, Operands& packed_scores, int stage,
                                int part) {
    if (call_.args.dropout.probability > 0) [[unlikely]] {
      drop(weights, scores, stage, part);
    }
    const uint32_t shared_scores = scores_address(stage, part);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      differentiate_step(weights, scores, deltas[step], step);
      pack_kept(packed_weights[step][0], weights, step);
      pack_left<Element>(packed_scores[step], scores, step);
      store_matrices(Swizzle<8>::advance(shared_scores, step), packed_scores[step][0]);
    }
  }

  /// scores: dP^T to dS^T, 16 queries of it.
  __device__ static void differentiate_step(const Scores& weights, Scores& scores,
                                            const float4& deltas, int step) {
#pragma unroll
    for (int n = 2 * step; n < 2 * step + 2; ++n) {
      const float2 delta = half_of(deltas, n % 2);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float* score = pair_of(scores, r, n);
        const float* weight = pair_of(weights, r, n);
        score[0] = score_gradient(fabsf(weight[0]), score[0], delta.x);
        score[1] = score_gradient(fabsf(weight[1]), score[1], delta.y);
      }
    }
  }

  /// Scores are what dropout leaves of them; weights that it removes get a sign, as dS takes them
  /// all and grad_value those that are kept.
  __device__ void drop(Scores& weights, Scores& scores, int stage, int part) {
    const auto& list = memory_.lists[stage];
    const uint32_t threshold = dropout_threshold(call_.args.dropout.probability);
    const float factor = kept_factor();
    const int32_t position[2]{row_position(0), row_position(1)};
    for_each_pair(weights, [&](float* weight, int r, int n) {
      const uint2 keys = pair_in(list.dropout_key, part * kTiles + n);
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

  /// Where this lane stores dS^T of a part: in its first 16 queries.
  __device__ uint32_t scores_address(int stage, int part) const {
    const int lane = threadIdx.x % 32;
    const int row = group_ * Shape::kGroupRows + threadIdx.x / 32 % 4 * 16 + lane % 16;
    return shared_address(memory_.scores[stage][part]) + Swizzle<8>::offset(row, lane / 16);
  }

  /// Begins sums = dS K, over the keys of both warpgroups: of a part of the queries, or of a panel
  /// of the keys' columns.
  template <typename Sums>
  __device__ void multiply_scores(Sums& sums) {
    const int offset = kParts == 2 ? 0 : group_ * Shape::kRowPanelBytes;
    const auto& keys = memory_.key[rows_.index];
    const uint32_t left = describe(shared_address(memory_.scores[stages_.index][sums_part()]));
    const uint32_t right[2]{describe(shared_address(keys[0]) + offset),
                            describe(shared_address(keys[1]) + offset)};
    begin_products();
#pragma unroll
    for (int step = 0; step < Shape::kRows / 16; ++step) {
      constexpr int kStepBytes = 16 * kPanelRowBytes / 16;
      Product<Element, Shape::kSumColumns>::transposed(
          sums[0], left + step * kStepBytes, right[step / 4] + step % 4 * kStepBytes, step > 0);
    }
    commit_products();
  }

  /// Where a warp's sums belong: the rows of a slot.
  __device__ SumTarget sum_target(int stage) const {
    const auto& list = memory_.lists[stage];
    const int slot = sums_part() * kPartSlots + threadIdx.x / 32 % 4;
    return {list.slots[slot].stride, list.sums[slot]};
  }
  template <typename Sums>
  __device__ void add_grad_query(const Sums& sums, const SumTarget& target, int stage) {
    add_sums<Shape>(call_, target, sums,
                    sum_buffer(stage) + threadIdx.x / 32 % 4 * kSlotRows * Shape::kSumColumns * 4,
                    kParts == 2 ? 0 : group_ * kPanelColumns);
  }
  __device__ unsigned char* sum_buffer(int stage) {
    if constexpr (Shape::kSumBytes > 0) {
      return memory_.sums[group_];
    } else {
      return memory_.scores[stage][group_];
    }
  }
  __device__ int sums_part() const { return kParts == 2 ? group_ : 0; }

  __device__ int32_t row_position(int r) const {
    return item_->rows.position[group_ * Shape::kGroupRows + group_row(r)];
  }
  __device__ Window seen_window(int r) const {
    return memory_.seen[rows_.index][group_ * Shape::kGroupRows + group_row(r)];
  }

  __device__ void finish();
  template <typename Gradient>
  __device__ void write(const MutableRows& out, const Gradient& gradient, float factor);

  static constexpr int kPartSlots = kPanelColumns / kSlotRows;
  static constexpr int kScoresAreWritten = 1, kScoresAreRead = 2, kPartIsRead = 3;

  const BackwardCall& call_;
  BackwardMemory<Shape>& memory_;
  const int group_;
  const typename Shape::RowItem* item_;
  Turn stages_{Shape::kStages};
  Turn rows_{Shape::kRowBuffers};
  Accumulators<1, Shape::kWidth / 8> grad_key_, grad_value_;
};

/// Writes grad_key and grad_value, through what dS^T was in: keys and values have been given back.
template <typename Element, typename Shape>
__device__ void BackwardWarpgroup<Element, Shape>::finish() {
  if (!call_.args.is_partial) {
    wait_for_sum_reads();
    sync_threads(kScoresAreRead, 256);
  }
  write(call_.args.grad_key, grad_key_, call_.args.scale);
  __syncwarp();
  write(call_.args.grad_value, grad_value_, kept_factor());
  __syncwarp();
}

/// Rounded, unless as they are. A panel takes the place of a stage's dS^T.
template <typename Element, typename Shape>
template <typename Gradient>
__device__ void BackwardWarpgroup<Element, Shape>::write(const MutableRows& out,
                                                         const Gradient& gradient, float factor) {
  const int first_row = group_ * Shape::kGroupRows;
  const GroupRows to{out, item_->work, item_->rows.position + first_row,
                     item_->rows.count - first_row, call_.args.head_dim};
  if (call_.args.is_partial) {
    write_floats(to, gradient, factor);
  } else {
    write_rounded<Element, 2>(
        to, gradient, factor,
        {memory_.scores[0][0] + group_ * Shape::kRowPanelBytes, sizeof(memory_.scores[0])});
  }
}

}  // namespace dilated::kernels::cuda::hopper

// A warpgroup's scores with a tile of keys, and the weights that they become: 64 rows, 16 a warp.
//
// As in the portable kernel, most tiles keep the reference that weights are taken against. Where
// weights turn out too large, or the reference too large for one rounding, a warp computes its
// scores again (mma.sync, as the other warps go on), rounded as logits, and its reference follows
// their maximum.
#pragma once

#include "kernels/cuda/hopper/forward_memory.cuh"
#include "kernels/cuda/hopper/group_rows.cuh"
#include "kernels/cuda/primitives/numerics.cuh"
#include "kernels/cuda/primitives/score.cuh"
#include "kernels/cuda/primitives/warp_tile.cuh"

namespace dilated::kernels::cuda::hopper {

/// r counts the two rows of which a lane holds some columns: r is row 8 * r + lane / 4 of the warp.
template <typename Element, typename Shape>
class ForwardScores {
 protected:
  using List = KeySlots<Shape::kSlots>;
  static constexpr int kKeyTiles = Shape::kColumns / 8, kPanelSteps = kPanelColumns / 16;

  __device__ ForwardScores(const ForwardCall& call, ForwardMemory<Shape>& memory)
      : call_(call), memory_(memory) {}

  /// Rows first_row .. of the item, whose queries begin at `query`.
  __device__ void set_rows(typename Shape::RowItem* item, int first_row, unsigned char* query) {
    item_ = item;
    first_row_ = first_row;
    query_ = query;
  }

  /// Before the rows' first tile.
  __device__ void forget() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      reference_[r] = negative_infinity();
      sum_[r] = 0;
    }
  }

  /// Begins scores = Q K^T.
  __device__ void multiply_keys(int stage) {
    begin_scores<Element, Shape::kWidth>(scores_[0], describe(shared_address(query_)),
                                         describe(shared_address(memory_.key[stage])));
  }

  /// The references of a first tile's scores, masked: their largest logits. False, and no
  /// references, if they are none that weigh_slots() could take. That of a row that sees nothing
  /// stays -inf.
  __device__ bool find_references(const List& list) {
    bool fits = call_.args.scale >= 0;  // else the largest score is the least logit
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float reference = negative_infinity();
#pragma unroll
      for (int s = 0; s < Shape::kSlots; ++s) {
        const float* pairs[2]{pair_of(scores_, r, 2 * s), pair_of(scores_, r, 2 * s + 1)};
        const float largest =
            fmaxf(fmaxf(pairs[0][0], pairs[0][1]), fmaxf(pairs[1][0], pairs[1][1]));
        const float bias = list.slots[s].bias_log2 * kLn2;
        reference = fmaxf(reference, logit_of(largest, call_.args.scale, bias));
      }
      reference_[r] = quad_max(reference);
      fits = fits &&
             (fabsf(reference_[r]) <= kLargestReference || reference_[r] == negative_infinity());
    }
    fits = __all_sync(kAllLanes, fits);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      reference_[r] = fits ? reference_[r] : negative_infinity();
    }
    return fits;
  }

  /// Scores to weights. True if references moved: out is to be multiplied by `factor`.
  __device__ bool weigh(int stage, Kind kind, float bias_log2, float (&factor)[2]) {
    const List& list = memory_.lists[stage];
    float sums[2];
    bool is_quick;
    if (kind.is_plain()) {
      weigh_plain(bias_log2, sums);
      is_quick = fit(sums);
    } else {
      is_quick = mask(kind, list) && (!kind.is_first() || find_references(list));
      if (is_quick) {
        weigh_slots(list, sums);
        is_quick = kind.is_first() || fit(sums);
      }
    }
    if (!is_quick) {
      multiply_keys_again(stage);
      apply_biases(list);
      move_references(factor);
      weigh_logits(sums);
    }
    add_sums(sums, list);
    return !is_quick;
  }

  __device__ void add_sums(const float (&sums)[2], const List& list) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum_[r] += sums[r];
    }
    if (call_.args.dropout.probability > 0) {
      drop(list);
    }
  }

  /// Scores of which no weight may remain become -inf. False, and nothing of it, if -inf is not
  /// what a weight of 0 comes from.
  __device__ bool mask(Kind kind, const List& list) {
    if (!kind.is_masked()) {
      return true;
    }
    if (!(call_.args.scale > 0)) {
      return false;
    }
    if (kind.is_windowed()) {
      const Window seen[2]{seen_window(0), seen_window(1)};
      for_each_score(list, [&](float& score, int r, const Slot& slot, int row) {
        score = masked_logit(score, seen[r], slot.position(row));
      });
    } else {
      const Through seen[2]{{row_position(0)}, {row_position(1)}};
      for_each_score(list, [&](float& score, int r, const Slot& slot, int row) {
        score = masked_logit(score, seen[r], slot.first + slot.stride * row);
      });
    }
    return true;
  }

  /// The row's reference; of one that has seen no key any number is right, as its weights are 0 or
  /// don't fit().
  __device__ float any_reference(int r) const {
    return reference_[r] == negative_infinity() ? 0 : reference_[r];
  }

  /// Scores to weights by one multiply-add each.
  __device__ void weigh_plain(float bias_log2, float (&sums)[2]) {
    const float offset[2]{quick_offset(any_reference(0), bias_log2),
                          quick_offset(any_reference(1), bias_log2)};
    exponentiate(
        sums, [&](float score, int r) { return quick_weight(score, call_.scale_log2, offset[r]); });
  }

  /// The same where slots differ in bias.
  __device__ void weigh_slots(const List& list, float (&sums)[2]) {
    const float base[2]{quick_offset(any_reference(0), 0), quick_offset(any_reference(1), 0)};
    sums[0] = sums[1] = 0;
    for_each_score(list, [&](float& score, int r, const Slot& slot, int) {
      score = quick_weight(score, call_.scale_log2, base[r] + slot.bias_log2);
      sums[r] += score;
    });
  }

  /// Scores to logits with their multiplicities, -inf where a row may not look.
  __device__ void apply_biases(const List& list) {
    const Window window[2]{seen_window(0), seen_window(1)};
    for_each_score(list, [&](float& score, int r, const Slot& slot, int row) {
      const float logit = logit_of(score, call_.args.scale, slot.bias_log2 * kLn2);
      score = masked_logit(logit, window[r], slot.position(row));
    });
  }

  /// Logits become weights; that of a row's reference is exactly 1.
  __device__ void weigh_logits(float (&sums)[2]) {
    const float base[2]{finite(reference_[0]), finite(reference_[1])};
    exponentiate(sums, [&](float logit, int r) { return weight_of(logit, base[r]); });
  }

  /// sums: of this lane's part of each row.
  template <typename Weight>
  __device__ void exponentiate(float (&sums)[2], const Weight& weight) {
    sums[0] = sums[1] = 0;
    for_each_pair(scores_, [&](float* pair, int r, int) {
      pair[0] = weight(pair[0], r);
      sums[r] += pair[0];
      pair[1] = weight(pair[1], r);
      sums[r] += pair[1];
    });
  }

  /// Calls visit(score, row of the warp, slot, row in the slot).
  template <typename Visit>
  __device__ void for_each_score(const List& list, const Visit& visit) {
#pragma unroll
    for (int s = 0; s < Shape::kSlots; ++s) {
      const Slot slot = list.slots[s];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          visit(pair_of(scores_, r, 2 * s + i / 2)[i % 2], r, slot, row);
        }
      }
    }
  }

  /// Whether the weights are within what 16 bits hold, and were taken against a reference that the
  /// row has seen, small enough for its rounding not to show.
  __device__ bool fit(const float (&sums)[2]) const {
    bool fits = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      fits = fits && !(sums[r] > kLargestSum) && fabsf(reference_[r]) <= kLargestReference;
    }
    return __all_sync(kAllLanes, fits);
  }

  __device__ void find_largest(float (&largest)[2]) {
    largest[0] = largest[1] = negative_infinity();
    for_each_pair(scores_, [&](const float* pair, int r, int) {
      largest[r] = fmaxf(largest[r], fmaxf(pair[0], pair[1]));
    });
  }

  /// The scores are logits.
  __device__ void move_references(float (&factor)[2]) {
    float largest[2];
    find_largest(largest);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float reference = fmaxf(reference_[r], quad_max(largest[r]));
      factor[r] = rescaling(reference_[r], reference);
      reference_[r] = reference;
      sum_[r] *= factor[r];
    }
  }

  /// Scores of this warp's rows, while other warps go on.
  __device__ void multiply_keys_again(int stage) {
    const int lane = threadIdx.x % 32;
    const uint32_t query =
        shared_address(query_) + left_offset<Swizzle<8>>(threadIdx.x / 32 % 4 * 16, lane);
    const uint32_t key = shared_address(memory_.key[stage]) + right_offset<Swizzle<8>>(lane);
    set_zero(scores_);
#pragma unroll 1
    for (int step = 0; step < Shape::kWidth / 16; ++step) {
      const int panel = step / kPanelSteps;
      uint32_t a[1][4];
      load_left<Swizzle<8>>(a, query + panel * Shape::kQueryPanelBytes, step % kPanelSteps);
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        multiply_rows_step<Element, Swizzle<8>>(
            scores_, n, a, key + panel * Shape::kColumnPanelBytes, step % kPanelSteps);
      }
    }
  }

  /// Weights that dropout removes become zero; the sums keep them.
  __device__ void drop(const List& list) {
    const uint32_t threshold = dropout_threshold(call_.args.dropout.probability);
    const uint32_t keys[2]{row_dropout_key(call_.args, item_->work, row_position(0)),
                           row_dropout_key(call_.args, item_->work, row_position(1))};
    for_each_score(list, [&](float& weight, int r, const Slot& slot, int row) {
      weight = dropout_keeps(keys[r], slot.first + slot.stride * row, threshold) ? weight : 0;
    });
  }

  __device__ int32_t row_position(int r) const {
    return item_->rows.position[first_row_ + group_row(r)];
  }
  /// Ends before the position of keys that don't exist.
  __device__ Window seen_window(int r) const {
    Window window = window_of(item_->rows, first_row_ + group_row(r), call_.args.is_causal,
                              /*over_keys=*/false);
    window.last = min(window.last, INT_MAX - 1);
    return window;
  }

  static constexpr float kLargestSum = 32768, kLargestReference = 256;

  const ForwardCall& call_;
  ForwardMemory<Shape>& memory_;
  typename Shape::RowItem* item_;
  int first_row_;
  unsigned char* query_;
  Accumulators<1, kKeyTiles> scores_;
  float reference_[2], sum_[2];
};

}  // namespace dilated::kernels::cuda::hopper

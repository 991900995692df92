// What a warpgroup does with its 64 rows: scores, running softmax and output. A warp has 16 of
// them. An item of 128 rows is shared by rows, one of 64 by keys: both warpgroups have all its
// rows, take tiles of its keys in turn, and one merges their results.
//
// While the tensor cores multiply tile i's weights with its values, the warps weigh tile i + 1. As
// in the portable kernel, most tiles keep the reference that weights are taken against. Where
// weights turn out too large, or the reference too large for one rounding, the warp computes its
// scores again (mma.sync, as the other warps go on), rounded as logits, and its reference follows
// their maximum.
//
// One class, since its steps share the accumulators.
#pragma once

#include "kernels/cuda/hopper/forward_memory.cuh"
#include "kernels/cuda/primitives/numerics.cuh"
#include "kernels/cuda/primitives/running.cuh"
#include "kernels/cuda/primitives/score.cuh"
#include "kernels/cuda/primitives/warp_tile.cuh"

namespace dilated::kernels::cuda::hopper {

template <typename Element, typename Shape>
class ForwardWarpgroup {
 public:
  static constexpr int kKeyTiles = Shape::kKeys / 8, kSteps = Shape::kKeys / 16;
  static constexpr int kPanelSteps = kPanelColumns / 16;

  __device__ ForwardWarpgroup(const ForwardCall& call, ForwardMemory<Shape>& memory)
      : call_(call), memory_(memory), group_(threadIdx.x / 128 - 1) {}

  /// All tiles of the block.
  __device__ void run() {
    Turn<Shape::kItems> items;
    Turn<Shape::kQueries> queries;
#pragma unroll 1
    for (;;) {
      Handover& item = memory_.item_turns[items.index];
      item.full.wait(items.full_parity());
      item_ = &memory_.items[items.index];
      if (item_->is_last) {
        return;
      }
      Handover& query = memory_.query_turns[queries.index];
      first_row_ = item_->is_split ? 0 : group_ * Shape::kGroupRows;
      query_ = memory_.query[queries.index][first_row_ / Shape::kGroupRows];
      query.full.wait(queries.full_parity());
      attend();
      finish();
      __syncwarp();
      release(query);
      release(item);
      items.advance();
      queries.advance();
    }
  }

 private:
  /// The warp is done with a buffer.
  __device__ static void release(Handover& handover) {
    if (threadIdx.x % 32 == 0) {
      handover.empty.arrive();
    }
  }
  __device__ const KeySlots<Shape::kSlots>& list() const { return memory_.lists[keys_.index]; }
  __device__ void wait_for_keys() { memory_.key_turns[keys_.index].full.wait(keys_.full_parity()); }
  __device__ void release_keys() {
    __syncwarp();  // all lanes have read the list
    release(memory_.key_turns[keys_.index]);
    keys_.advance();
  }
  __device__ void wait_for_values() {
    memory_.value_turns[values_.index].full.wait(values_.full_parity());
  }
  __device__ void release_values() {
    release(memory_.value_turns[values_.index]);
    values_.advance();
  }
  /// Those of tiles that were passed.
  __device__ void pass_values() {
    for (; passed_ > 0; --passed_) {
      wait_for_values();
      release_values();
    }
  }

  /// The item's list: the tiles of it that this warpgroup takes.
  __device__ void attend() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      reference_[r] = negative_infinity();
      sum_[r] = 0;
    }
    has_out_ = false;
    tiles_ = item_->key_tiles;
    while (find_tile(INT_MAX)) {
      begin();
      while (find_tile(1)) {
        go_on();
      }
      end();
    }
    if (!has_out_) {
      set_zero(out_);
    }
  }

  /// Waits for the next tile that this warpgroup takes, and passes others. False if there is none,
  /// or if it would have to pass more than `most`: without the values that this warpgroup still
  /// needs, the other can't go on for ever.
  __device__ bool find_tile(int most) {
    for (; tiles_ > 0; --tiles_) {
      wait_for_keys();
      if ((list().takers >> group_ & 1) != 0) {
        return true;
      }
      if (passed_ == most) {
        return false;
      }
      release_keys();
      ++passed_;
      if (most == INT_MAX) {
        pass_values();
      }
    }
    return false;
  }

  /// A tile, but for its values.
  __device__ void begin() {
    multiply_keys();
    wait_for_products<0>();
    weigh_alone();
    release_keys();
    pack_weights();
    --tiles_;
  }

  /// The values of the tile before, and the next but for its values.
  __device__ void go_on() {
    multiply_keys();
    wait_for_values();
    multiply_values();
    wait_for_products<1>();
    float factor[2];
    const bool is_moved = weigh(factor);
    release_keys();
    wait_for_products<0>();
    release_values();
    pass_values();
    if (is_moved) {
      scale_out(factor);
    }
    pack_weights();
    --tiles_;
  }

  /// The values of the tile before.
  __device__ void end() {
    wait_for_values();
    multiply_values();
    wait_for_products<0>();
    release_values();
    pass_values();
  }

  /// Begins scores = Q K^T.
  __device__ void multiply_keys() {
    const uint64_t query = describe(shared_address(query_));
    const uint64_t key = describe(shared_address(memory_.key[keys_.index]));
    begin_products();
#pragma unroll
    for (int step = 0; step < Shape::kWidth / 16; ++step) {
      const int panel = step / kPanelSteps, bytes = step % kPanelSteps * 32;
      Product<Element, Shape::kKeys>::rows(
          scores_[0], query + (panel * Shape::kQueryPanelBytes + bytes) / 16,
          key + (panel * Shape::kKeyPanelBytes + bytes) / 16, step > 0);
    }
    commit_products();
  }

  /// Begins out += P V.
  __device__ void multiply_values() {
    const uint64_t value =
        describe(shared_address(memory_.value[values_.index]), Shape::kKeyPanelBytes);
    begin_products();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Product<Element, Shape::kWidth>::weights(out_[0], weights_[step][0],
                                               value + step * 16 * kPanelRowBytes / 16,
                                               step > 0 || has_out_);
    }
    commit_products();
    has_out_ = true;
  }

  __device__ void pack_weights() {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      pack_left<Element>(weights_[step], scores_, step);
    }
  }

  __device__ void scale_out(const float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      scale_row(out_, r, factor[r]);
    }
  }

  /// Scores to weights, while no product is under way.
  __device__ void weigh_alone() {
    const KeySlots<Shape::kSlots>& list = this->list();
    float sums[2];
    if (!has_out_ && list.is_plain && find_references(list.slots[0].bias_log2)) {
      weigh_plain(list.slots[0].bias_log2, sums);
    } else {
      float factor[2];
      apply_biases(list);
      move_references(factor);
      weigh_logits(sums);
      if (has_out_) {
        scale_out(factor);
      }
    }
    add_sums(sums, list);
  }

  /// The references of scores that are all seen, with the same bias; false, and no references, if
  /// they are no logits that weigh_plain() could take.
  __device__ bool find_references(float bias_log2) {
    float largest[2];
    find_largest(largest);
    bool fits = call_.args.scale >= 0;  // else the largest score is the least logit
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      reference_[r] = logit_of(quad_max(largest[r]), call_.args.scale, bias_log2 * kLn2);
      fits = fits && fabsf(reference_[r]) <= kLargestReference;
    }
    fits = __all_sync(kAllLanes, fits);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      reference_[r] = fits ? reference_[r] : negative_infinity();
    }
    return fits;
  }

  /// Scores to weights. True if references moved: out is to be multiplied by `factor`.
  __device__ bool weigh(float (&factor)[2]) {
    const KeySlots<Shape::kSlots>& list = this->list();
    float sums[2];
    if (list.is_plain) {
      weigh_plain(list.slots[0].bias_log2, sums);
    } else {
      list.is_masked ? weigh_slots<true>(list, sums) : weigh_slots<false>(list, sums);
    }
    const bool is_moved = !fit(sums);
    if (is_moved) {
      multiply_keys_again();
      apply_biases(list);
      move_references(factor);
      weigh_logits(sums);
    }
    add_sums(sums, list);
    return is_moved;
  }

  __device__ void add_sums(const float (&sums)[2], const KeySlots<Shape::kSlots>& list) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum_[r] += sums[r];
    }
    if (call_.args.dropout.probability > 0) {
      drop(list);
    }
  }

  __device__ void weigh_plain(float bias_log2, float (&sums)[2]) {
    const float offset[2]{quick_offset(finite(reference_[0]), bias_log2),
                          quick_offset(finite(reference_[1]), bias_log2)};
    exponentiate(
        sums, [&](float score, int r) { return quick_weight(score, call_.scale_log2, offset[r]); });
  }

  /// The same where slots differ in bias, or have empty rows; kIsMasked: or rows in what they see.
  template <bool kIsMasked>
  __device__ void weigh_slots(const KeySlots<Shape::kSlots>& list, float (&sums)[2]) {
    const float base[2]{quick_offset(finite(reference_[0]), 0),
                        quick_offset(finite(reference_[1]), 0)};
    const Window window[2]{seen_window(0), seen_window(1)};
    sums[0] = sums[1] = 0;
    for_each_score(list, [&](float& score, int r, const Slot& slot, int row) {
      const float weight = quick_weight(score, call_.scale_log2, base[r] + slot.bias_log2);
      if constexpr (kIsMasked) {
        score = masked_weight(weight, window[r], slot.position(row));
      } else {
        score = row < slot.empty ? 0 : weight;
      }
      sums[r] += score;
    });
  }

  /// Scores to logits with their multiplicities, -inf where a row may not look.
  __device__ void apply_biases(const KeySlots<Shape::kSlots>& list) {
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
  __device__ void for_each_score(const KeySlots<Shape::kSlots>& list, const Visit& visit) {
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
  __device__ void multiply_keys_again() {
    const int lane = threadIdx.x % 32;
    const uint32_t query =
        shared_address(query_) + left_offset<Swizzle<8>>(threadIdx.x / 32 % 4 * 16, lane);
    const uint32_t key = shared_address(memory_.key[keys_.index]) + right_offset<Swizzle<8>>(lane);
    set_zero(scores_);
#pragma unroll 1
    for (int step = 0; step < Shape::kWidth / 16; ++step) {
      const int panel = step / kPanelSteps;
      uint32_t a[1][4];
      load_left<Swizzle<8>>(a, query + panel * Shape::kQueryPanelBytes, step % kPanelSteps);
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        multiply_rows_step<Element, Swizzle<8>>(scores_, n, a, key + panel * Shape::kKeyPanelBytes,
                                                step % kPanelSteps);
      }
    }
  }

  /// Weights that dropout removes become zero; the sums keep them.
  __device__ void drop(const KeySlots<Shape::kSlots>& list) {
    const uint32_t threshold = dropout_threshold(call_.args.dropout.probability);
    const uint32_t keys[2]{row_dropout_key(call_.args, item_->work, row_position(0)),
                           row_dropout_key(call_.args, item_->work, row_position(1))};
    for_each_score(list, [&](float& weight, int r, const Slot& slot, int row) {
      weight = dropout_keeps(keys[r], slot.first + slot.stride * row, threshold) ? weight : 0;
    });
  }

  __device__ void finish();
  __device__ void normalize(float (&lse)[2]);
  __device__ void hand_over(const float (&lse)[2]);
  __device__ void take_over(float (&lse)[2]);
  __device__ void write_out(const float (&lse)[2], int32_t rows);

  /// Of the warpgroup's 64.
  __device__ int group_row(int r) const {
    return threadIdx.x / 32 % 4 * 16 + r * 8 + threadIdx.x % 32 / 4;
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

  // Barriers of the warpgroups among themselves; 0 is __syncthreads's.
  static constexpr int kQueryIsRead = 1, kResultIsWritten = 2, kResultIsRead = 3;
  static constexpr float kLargestSum = 32768, kLargestReference = 256;

  const ForwardCall& call_;
  ForwardMemory<Shape>& memory_;
  const int group_;
  Turn<Shape::kKeyStages> keys_;
  Turn<Shape::kValueStages> values_;
  typename Shape::QueryItem* item_;
  unsigned char* query_;
  int first_row_;   // of the item
  int tiles_;       // of its list, that are left
  int passed_ = 0;  // tiles since the last taken one, whose values are still to be passed
  bool has_out_;
  Accumulators<1, kKeyTiles> scores_;
  Accumulators<1, Shape::kWidth / 8> out_;
  uint32_t weights_[kSteps][1][4];
  float reference_[2], sum_[2];
};

/// Normalizes and writes the rows that exist; of an item whose keys are split, the first warpgroup
/// does, with the second one's result.
template <typename Element, typename Shape>
__device__ void ForwardWarpgroup<Element, Shape>::finish() {
  float lse[2];
  normalize(lse);
  if (item_->is_split && group_ == 1) {
    hand_over(lse);
    return;
  }
  if (item_->is_split) {
    take_over(lse);
  }
  write_out(lse, item_->rows.count - first_row_);
}

template <typename Element, typename Shape>
__device__ void ForwardWarpgroup<Element, Shape>::normalize(float (&lse)[2]) {
  // Those of padding, once an item.
  const bool has_zeros = !(item_->is_split && group_ == 1);
  const float zero_keys = has_zeros ? static_cast<float>(item_->work.group.zero_keys) : 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = quad_sum(sum_[r]);
    float reference = reference_[r];
    float factor = 1;
    if (zero_keys > 0) {
      reference = fmaxf(reference, 0.0f);
      factor = exp_approx(reference_[r] - reference);
      sum = sum * factor + zero_keys * exp_approx(-reference);
    }
    const float kept = 1 - call_.args.dropout.probability;
    scale_row(out_, r, sum == 0 ? 0 : factor * reciprocal_approx(sum * kept));
    lse[r] = sum == 0 ? negative_infinity() : reference + logf(sum);
  }
}

/// Through the queries' memory and the part of the item's list of rows that has no rows: each
/// thread gets what the same thread of the other warpgroup has.
template <typename Element, typename Shape>
__device__ void ForwardWarpgroup<Element, Shape>::hand_over(const float (&lse)[2]) {
  sync_threads(kQueryIsRead, 256);
  float* to = reinterpret_cast<float*>(query_) + threadIdx.x % 128;
  for_each_pair(out_, [&](const float* pair, int r, int n) {
    to[((n * 2 + r) * 2) * 128] = pair[0];
    to[((n * 2 + r) * 2 + 1) * 128] = pair[1];
  });
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (threadIdx.x % 4 == 0) {
      item_->rows.position[Shape::kGroupRows + group_row(r)] = __float_as_int(lse[r]);
    }
  }
  arrive_at(kResultIsWritten, 256);
}

template <typename Element, typename Shape>
__device__ void ForwardWarpgroup<Element, Shape>::take_over(float (&lse)[2]) {
  arrive_at(kQueryIsRead, 256);
  sync_threads(kResultIsWritten, 256);
  const float* from = reinterpret_cast<const float*>(query_) + threadIdx.x % 128;
  Merged merged[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = Shape::kGroupRows + group_row(r);
    merged[r] = merge(__int_as_float(item_->rows.position[row]), lse[r]);
    lse[r] = merged[r].lse;
  }
  for_each_pair(out_, [&](float* pair, int r, int n) {
    const float* other = from + (n * 2 + r) * 2 * 128;
    pair[0] = pair[0] * merged[r].block_weight + other[0] * merged[r].running_weight;
    pair[1] = pair[1] * merged[r].block_weight + other[128] * merged[r].running_weight;
  });
  sync_threads(kResultIsRead, 128);
}

/// Rounded once, through the queries' memory, of which each warp uses its own rows; lse as natural
/// logarithm.
template <typename Element, typename Shape>
__device__ void ForwardWarpgroup<Element, Shape>::write_out(const float (&lse)[2], int32_t rows) {
  const ForwardArgs& args = call_.args;
  const WorkItem& work = item_->work;
  float* lse_row = static_cast<float*>(args.lse) +
                   (work.batch * args.heads + work.head) * args.queries + work.tile.row_shift;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (threadIdx.x % 4 == 0 && group_row(r) < rows) {
      lse_row[row_position(r)] = lse[r];
    }
  }
  const int lane = threadIdx.x % 32;
  __syncwarp();
  for_each_pair(out_, [&](const float* pair, int r, int n) {
    *reinterpret_cast<uint32_t*>(query_ + n / 8 * Shape::kQueryPanelBytes +
                                 Swizzle<8>::offset(group_row(r), n % 8) + lane % 4 * 4) =
        pack<Element>(pair[0], pair[1]);
  });
  __syncwarp();
  uint16_t* origin = row_at<uint16_t>(args.out, work.batch, work.tile.row_shift, work.head);
  constexpr int kChunks = Shape::kWidth / 8;
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int row = threadIdx.x / 32 % 4 * 16 + i / kChunks, chunk = i % kChunks;
    if (row < rows && chunk * 8 < args.head_dim) {
      const int32_t position = item_->rows.position[first_row_ + row];
      *reinterpret_cast<int4*>(origin + position * args.out.strides.row + chunk * 8) =
          *reinterpret_cast<const int4*>(query_ + chunk / 8 * Shape::kQueryPanelBytes +
                                         Swizzle<8>::offset(row, chunk % 8));
    }
  }
}

}  // namespace dilated::kernels::cuda::hopper

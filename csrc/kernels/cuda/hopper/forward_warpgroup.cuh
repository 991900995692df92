// What a warpgroup does with its 64 rows of queries, 16 a warp. An item of 128 rows of a group is
// shared by rows; of two groups of up to 64, each warpgroup takes one, with its own keys; of a lone
// one both have all rows, take tiles of its keys in turn, and one merges their results.
//
// While the tensor cores multiply tile i's weights with its values, the warps weigh tile i + 1.
#pragma once

#include "kernels/cuda/hopper/forward_scores.cuh"

namespace dilated::kernels::cuda::hopper {

template <typename Element, typename Shape>
class ForwardWarpgroup : ForwardScores<Element, Shape> {
  using Scores = ForwardScores<Element, Shape>;
  using Scores::call_, Scores::memory_, Scores::item_, Scores::first_row_, Scores::query_;
  using Scores::scores_, Scores::reference_, Scores::sum_, Scores::row_position;

 public:
  __device__ ForwardWarpgroup(const ForwardCall& call, ForwardMemory<Shape>& memory)
      : Scores(call, memory), group_(computing_group()) {}

  /// All tiles of the block.
  __device__ void run() {
    Turn items{Shape::kItems};
#pragma unroll 1
    for (;;) {
      Handover& item = memory_.item_turns[items.index];
      item.full.wait(items.full_parity());
      auto* rows = &memory_.items[items.index];
      if (rows->sharing == Sharing::kLast) {
        return;
      }
      Handover& query = memory_.query_turns[items.index];
      const int part = rows->sharing == Sharing::kColumns ? 0 : group_;
      this->set_rows(rows, part * Shape::kGroupRows, memory_.query[items.index][part]);
      query.full.wait(items.full_parity());
      attend();
      finish();
      __syncwarp();
      release(query);
      release(item);
      items.advance();
    }
  }

 private:
  /// The warp is done with a buffer.
  __device__ static void release(Handover& handover) {
    if (threadIdx.x % 32 == 0) {
      handover.empty.arrive();
    }
  }
  __device__ void wait_for_keys() { memory_.key_turns[keys_.index].full.wait(keys_.full_parity()); }
  __device__ void release_keys() {
    __syncwarp();  // all lanes have read the list
    release(memory_.key_turns[keys_.index]);
    keys_.advance();
    --tiles_;
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
    this->forget();
    set_zero(out_);
    first_ = Kind::kFirst;
    tiles_ = count_tiles(*item_);
    look();
    while (pass_tiles(INT_MAX)) {
      this->multiply_keys(keys_.index);
      wait_for_products<0>();
      int values_under_way = 0;
#pragma unroll 1
      for (;;) {
        weigh_tile(values_under_way != 0);
        if (!pass_tiles(1)) {
          break;
        }
        multiply();
        wait_for_products<1>();
        values_under_way = 1;
        asm volatile("" : "+r"(values_under_way));  // else the loop's body is there twice
      }
      end();
    }
  }

  /// Waits for the next tile of keys, if there is one, and reads what it is.
  __device__ void look() {
    if (tiles_ > 0) {
      wait_for_keys();
      const KeySummary& summary = memory_.lists[keys_.index].summary;
      kind_.bits = summary.kind(group_).bits | first_;
      bias_log2_ = summary.bias_log2;
    }
  }

  /// Passes tiles that this warpgroup doesn't take. False if none is left, or if it would have to
  /// pass more than `most`: without the values that this warpgroup still needs, the other can't go
  /// on for ever.
  __device__ bool pass_tiles(int most) {
    while (tiles_ > 0 && kind_.is_passed()) {
      if (passed_ == most) {
        return false;
      }
      release_keys();
      ++passed_;
      if (most == INT_MAX) {
        pass_values();
      }
      look();
    }
    return tiles_ > 0;
  }

  /// Begins the product with the next tile's keys, then that with this one's values.
  __device__ void multiply() {
    const uint32_t value = describe_values();
    this->multiply_keys(keys_.index);
    wait_for_values();
    multiply_values(value);
  }

  /// Scores to weights, while the values of the tile before are under way, if there is one.
  __device__ void weigh_tile(bool has_values) {
    // Looking waits for keys, which may come after the values of all tiles before them.
    const bool looks_early = Shape::kValueStages > 3 || passed_ == 0;
    float factor[2];
    const bool is_moved = this->weigh(keys_.index, kind_, bias_log2_, factor);
    first_ = 0;
    release_keys();
    if (looks_early) {
      look();
    }
    wait_for_products<0>();
    if (has_values) {
      release_values();
      pass_values();
    }
    if (!looks_early) {
      look();
    }
    if (is_moved) {
      scale_out(factor);
    }
    pack_weights();
  }

  /// The values of the tile before.
  __device__ void end() {
    const uint32_t value = describe_values();
    wait_for_values();
    multiply_values(value);
    wait_for_products<0>();
    release_values();
    pass_values();
  }

  __device__ uint32_t describe_values() const {
    return describe(shared_address(memory_.value[values_.index]), Shape::kColumnPanelBytes);
  }

  /// Begins out += P V.
  __device__ void multiply_values(uint32_t value) { begin_sums<Element>(out_[0], weights_, value); }

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

  __device__ void finish();
  /// rows: how many of the warpgroup's exist.
  __device__ void hand_over(int32_t rows);
  __device__ void take_over(int32_t rows);
  __device__ void normalize(int32_t rows);
  __device__ void add_running(const float (&weight)[2]);
  __device__ int64_t lse_at(int r) const;

  // Barriers of the warpgroups among themselves; 0 is __syncthreads's.
  static constexpr int kQueryIsRead = 1, kResultIsWritten = 2, kResultIsRead = 3;
  static constexpr int kSteps = Shape::kColumns / 16;

  const int group_;
  Turn keys_{Shape::kKeyStages};
  Turn values_{Shape::kValueStages};
  int tiles_;  // of the item's list, that are left; the next one:
  Kind kind_;
  float bias_log2_;
  int passed_ = 0;  // tiles since the last taken one, whose values are still to be passed
  uint32_t first_;  // Kind::kFirst until it has taken one of the item
  Accumulators<1, Shape::kWidth / 8> out_;
  uint32_t weights_[kSteps][1][4];
};

}  // namespace dilated::kernels::cuda::hopper

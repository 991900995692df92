// The end of an item: from accumulators to rows of out and lse.
#pragma once

#include "kernels/cuda/hopper/forward_warpgroup.cuh"
#include "kernels/cuda/primitives/running.cuh"

namespace dilated::kernels::cuda::hopper {

/// Normalizes and writes the rows that exist; of an item whose keys are split, the first warpgroup
/// does, with the second one's result.
template <typename Element, typename Shape>
__device__ void ForwardWarpgroup<Element, Shape>::finish() {
  const int32_t rows = item_->row_count[group_];
  const bool is_split = item_->sharing == Sharing::kColumns;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum_[r] = quad_sum(sum_[r]);
  }
  if (is_split && group_ == 1) {
    hand_over(rows);
    return;
  }
  if (is_split) {
    take_over(rows);
  }
  normalize(rows);
  const GroupRows to{call_.args.out, item_->work, item_->rows.position + first_row_, rows,
                     call_.args.head_dim};
  if (call_.args.is_partial) {
    write_floats(to, out_, 1);
  } else {
    __syncwarp();
    write_rounded<Element, 4>(to, out_, 1, {query_, Shape::kQueryPanelBytes});
  }
}

template <typename Element, typename Shape>
__device__ int64_t ForwardWarpgroup<Element, Shape>::lse_at(int r) const {
  const WorkItem& work = item_->work;
  return (work.batch * call_.args.heads + work.head) * call_.args.queries + work.tile.row_shift +
         row_position(r);
}

/// Through the queries' memory, the part of the item's list of rows that has no rows, and lse: each
/// thread gets what the same thread of the other warpgroup has.
template <typename Element, typename Shape>
__device__ void ForwardWarpgroup<Element, Shape>::hand_over(int32_t rows) {
  sync_threads(kQueryIsRead, 256);
  float* to = reinterpret_cast<float*>(query_) + threadIdx.x % 128;
  for_each_pair(out_, [&](const float* pair, int r, int n) {
    to[((n * 2 + r) * 2) * 128] = pair[0];
    to[((n * 2 + r) * 2 + 1) * 128] = pair[1];
  });
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (threadIdx.x % 4 == 0 && group_row(r) < rows) {
      item_->rows.position[Shape::kGroupRows + group_row(r)] = __float_as_int(reference_[r]);
      static_cast<float*>(call_.args.lse)[lse_at(r)] = sum_[r];
    }
  }
  arrive_at(kResultIsWritten, 256);
}

template <typename Element, typename Shape>
__device__ void ForwardWarpgroup<Element, Shape>::take_over(int32_t rows) {
  arrive_at(kQueryIsRead, 256);
  sync_threads(kResultIsWritten, 256);
  const float* from = reinterpret_cast<const float*>(query_) + threadIdx.x % 128;
  float factor[2], other_factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = group_row(r);
    const bool exists = row < rows;
    const float other = exists ? __int_as_float(item_->rows.position[Shape::kGroupRows + row])
                               : negative_infinity();
    const float other_sum = exists ? static_cast<const float*>(call_.args.lse)[lse_at(r)] : 0;
    const float reference = fmaxf(reference_[r], other);
    factor[r] = rescaling(reference_[r], reference);
    other_factor[r] = rescaling(other, reference);
    reference_[r] = reference;
    sum_[r] = sum_[r] * factor[r] + other_sum * other_factor[r];
  }
  for_each_pair(out_, [&](float* pair, int r, int n) {
    const float* other = from + (n * 2 + r) * 2 * 128;
    pair[0] = pair[0] * factor[r] + other[0] * other_factor[r];
    pair[1] = pair[1] * factor[r] + other[128] * other_factor[r];
  });
  sync_threads(kResultIsRead, 128);
}

/// Merges with the running result, if there is one, and writes lse, a natural logarithm.
template <typename Element, typename Shape>
__device__ void ForwardWarpgroup<Element, Shape>::normalize(int32_t rows) {
  const ForwardArgs& args = call_.args;
  const auto zero_keys = static_cast<float>(item_->work.group.zero_keys);
  const float kept = 1 - args.dropout.probability;
  float running_weight[2]{};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float factor = add_zero_keys(zero_keys, reference_[r], sum_[r]);
    factor = sum_[r] == 0 ? 0 : factor * reciprocal_approx(sum_[r] * kept);
    float row_lse = sum_[r] == 0 ? negative_infinity() : reference_[r] + logf(sum_[r]);
    const bool exists = group_row(r) < rows;
    if (args.running_lse != nullptr && exists) {
      const auto* running_lse = static_cast<const float*>(args.running_lse);
      const Merged merged = merge(running_lse[lse_at(r)], row_lse);
      row_lse = merged.lse;
      factor *= merged.block_weight;
      running_weight[r] = merged.running_weight;
    }
    scale_row(out_, r, factor);
    if (threadIdx.x % 4 == 0 && exists) {
      static_cast<float*>(args.lse)[lse_at(r)] = row_lse;
    }
  }
  add_running(running_weight);
}

/// A row of weight 0 is not read.
template <typename Element, typename Shape>
__device__ void ForwardWarpgroup<Element, Shape>::add_running(const float (&weight)[2]) {
  const ForwardArgs& args = call_.args;
  const WorkItem& work = item_->work;
  if (args.running_lse == nullptr) {
    return;
  }
  const auto* from = row_at<float>(args.running_out, work.batch, work.tile.row_shift, work.head);
  for_each_pair(out_, [&](float* pair, int r, int n) {
    const int column = n * 8 + threadIdx.x % 4 * 2;
    if (weight[r] > 0 && column < args.head_dim) {
      const float2 running = __ldcs(reinterpret_cast<const float2*>(
          from + row_position(r) * args.running_out.strides.row + column));
      pair[0] += weight[r] * running.x;
      pair[1] += weight[r] * running.y;
    }
  });
}

}  // namespace dilated::kernels::cuda::hopper

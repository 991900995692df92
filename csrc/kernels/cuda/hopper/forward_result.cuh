// The end of an item: from accumulators to rows of out and lse.
#pragma once

#include "kernels/cuda/hopper/forward_warpgroup.cuh"
#include "kernels/cuda/primitives/running.cuh"

namespace dilated::kernels::cuda::hopper {

/// Normalizes and writes the rows that exist; of an item whose keys are split, the first warpgroup
/// does, with the second one's result.
template <typename Element, typename Shape>
__device__ void ForwardWarpgroup<Element, Shape>::finish() {
  const int32_t rows = item_->rows.count - first_row_;
  float* lse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum_[r] = quad_sum(sum_[r]);
    lse[r] = group_row(r) < rows ? lse_at(row_position(r)) : nullptr;
  }
  if (item_->is_split && group_ == 1) {
    hand_over(lse);
    return;
  }
  if (item_->is_split) {
    take_over(lse);
  }
  normalize(lse);
  write_out(rows);
}

template <typename Element, typename Shape>
__device__ float* ForwardWarpgroup<Element, Shape>::lse_at(int32_t position) const {
  const ForwardArgs& args = call_.args;
  const WorkItem& work = item_->work;
  return static_cast<float*>(args.lse) + (work.batch * args.heads + work.head) * args.queries +
         work.tile.row_shift + position;
}

/// Through the queries' memory, the part of the item's list of rows that has no rows, and lse: each
/// thread gets what the same thread of the other warpgroup has.
template <typename Element, typename Shape>
__device__ void ForwardWarpgroup<Element, Shape>::hand_over(float* const (&lse)[2]) {
  sync_threads(kQueryIsRead, 256);
  float* to = reinterpret_cast<float*>(query_) + threadIdx.x % 128;
  for_each_pair(out_, [&](const float* pair, int r, int n) {
    to[((n * 2 + r) * 2) * 128] = pair[0];
    to[((n * 2 + r) * 2 + 1) * 128] = pair[1];
  });
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (threadIdx.x % 4 == 0 && lse[r] != nullptr) {
      item_->rows.position[Shape::kGroupRows + group_row(r)] = __float_as_int(reference_[r]);
      *lse[r] = sum_[r];
    }
  }
  arrive_at(kResultIsWritten, 256);
}

template <typename Element, typename Shape>
__device__ void ForwardWarpgroup<Element, Shape>::take_over(float* const (&lse)[2]) {
  arrive_at(kQueryIsRead, 256);
  sync_threads(kResultIsWritten, 256);
  const float* from = reinterpret_cast<const float*>(query_) + threadIdx.x % 128;
  float factor[2], other_factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = Shape::kGroupRows + group_row(r);
    const float other =
        lse[r] == nullptr ? negative_infinity() : __int_as_float(item_->rows.position[row]);
    const float reference = fmaxf(reference_[r], other);
    factor[r] = rescaling(reference_[r], reference);
    other_factor[r] = rescaling(other, reference);
    reference_[r] = reference;
    sum_[r] = sum_[r] * factor[r] + (lse[r] == nullptr ? 0 : *lse[r]) * other_factor[r];
  }
  for_each_pair(out_, [&](float* pair, int r, int n) {
    const float* other = from + (n * 2 + r) * 2 * 128;
    pair[0] = pair[0] * factor[r] + other[0] * other_factor[r];
    pair[1] = pair[1] * factor[r] + other[128] * other_factor[r];
  });
  sync_threads(kResultIsRead, 128);
}

/// And writes lse, a natural logarithm.
template <typename Element, typename Shape>
__device__ void ForwardWarpgroup<Element, Shape>::normalize(float* const (&lse)[2]) {
  const auto zero_keys = static_cast<float>(item_->work.group.zero_keys);
  const float kept = 1 - call_.args.dropout.probability;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float factor = add_zero_keys(zero_keys, reference_[r], sum_[r]);
    scale_row(out_, r, sum_[r] == 0 ? 0 : factor * reciprocal_approx(sum_[r] * kept));
    if (threadIdx.x % 4 == 0 && lse[r] != nullptr) {
      *lse[r] = sum_[r] == 0 ? negative_infinity() : reference_[r] + logf(sum_[r]);
    }
  }
}

/// Rounded once, through the queries' memory, of which each warp uses its own rows.
template <typename Element, typename Shape>
__device__ void ForwardWarpgroup<Element, Shape>::write_out(int32_t rows) {
  const ForwardArgs& args = call_.args;
  const WorkItem& work = item_->work;
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

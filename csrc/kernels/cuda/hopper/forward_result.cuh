// The end of an item: from accumulators to rows of out and lse.
#pragma once

#include "kernels/cuda/hopper/forward_warpgroup.cuh"
#include "kernels/cuda/primitives/running.cuh"

namespace dilated::kernels::cuda::hopper {

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
    const float factor = add_zero_keys(zero_keys, reference, sum);
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

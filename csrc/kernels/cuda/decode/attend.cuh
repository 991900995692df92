// The kernels of a step: blocks that walk their part of a head's tiles, and what puts the parts of
// a split head together. A step that appends reads the new position from where it is given, so that
// no block waits for the one that writes it into the cache.
#pragma once

#include "kernels/cuda/decode/plan.cuh"
#include "kernels/cuda/primitives/numerics.cuh"

namespace dilated::kernels::cuda::decode {

/// What a block's warps found, in shared memory.
template <int kColumns>
struct Found {
  float sums[kWarps][kMostHeads][kColumns];
  float max[kWarps][kMostHeads], denominator[kWarps][kMostHeads];
};

/// out and lse of one query, from parts relative to maxima of their own, to base 2. A denominator
/// of 0 is that of no key; NaN stays NaN.
struct Whole {
  float max, denominator;
  __device__ float lse() const {
    return denominator == 0.0f ? negative_infinity() : max + log2_approx(denominator);
  }
};

template <typename Element>
__device__ void write_result(const DecodeAttendArgs& args, int64_t batch, int64_t index,
                             int64_t head, int column, float sum, const Whole& whole) {
  const float out = whole.denominator == 0.0f ? 0.0f : sum / whole.denominator;
  row_at<Element>(args.out, batch, index, head)[column] = from_float<Element>(out);
  if (column == 0) {
    static_cast<float*>(args.lse)[(batch * args.heads + head) * args.queries + index] =
        whole.lse() * kLn2;
  }
}

/// Puts the warps' parts together, and writes the block's: a result, or a split.
template <typename Element, int kColumns>
__device__ void write_block(const AttendCall& call, const Block& block,
                            const Found<kColumns>& found) {
  const DecodeAttendArgs& args = call.args;
  const auto head_dim = static_cast<int>(args.head_dim);
  for (int i = threadIdx.x; i < block.heads * head_dim; i += kThreads) {
    const int head = i / head_dim, column = i - head * head_dim;
    Whole whole{negative_infinity(), 0.0f};
    for (int warp = 0; warp < kWarps; ++warp) {
      whole.max = fmaxf(whole.max, found.max[warp][head]);
    }
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      const float max = found.max[warp][head];
      const float factor = max == negative_infinity() ? 0.0f : exp2_approx(max - whole.max);
      whole.denominator += factor * found.denominator[warp][head];
      sum += factor * found.sums[warp][head][column];
    }
    if (call.choice.splits == 1) {
      write_result<Element>(args, block.batch, block.index, block.first_head + head, column, sum,
                            whole);
      continue;
    }
    const int64_t query = static_cast<int64_t>(block.batch) * args.queries + block.index;
    const int64_t split =
        (query * args.heads + block.first_head + head) * call.choice.splits + block.split;
    // A split without keys is not read.
    call.split_sums[split * head_dim + column] = sum / whole.denominator;
    if (column == 0) {
      call.split_lse[split] = whole.lse();
    }
  }
}

/// What the block's heads keep of an appended position.
template <typename Element>
__device__ void store_appended(const DecodeStepArgs& args, const Block& block, const Plan& plan) {
  if (args.lengths[block.batch] + count_of(args, block.batch) > args.max_seq_len) {
    __trap();
  }
  const auto* key = row_at<Element>(args.new_key, block.batch, 0, block.kv_head);
  const auto* value = row_at<Element>(args.new_value, block.batch, 0, block.kv_head);
  for (int branch = static_cast<int>(threadIdx.x / 32); branch < args.branches; branch += kWarps) {
    const int64_t row = plan.new_row[branch];
    if (row < 0 || row >= args.rows) {
      continue;
    }
    auto* to_key = row_at<Element>(args.key_rows, block.batch, row, 0);
    auto* to_value = row_at<Element>(args.value_rows, block.batch, row, 0);
    for (int64_t column = threadIdx.x % 32; column < args.head_dim; column += 32) {
      to_key[column] = key[column];
      to_value[column] = value[column];
    }
  }
}

template <typename Element, typename Rows>
__global__ void __launch_bounds__(kThreads, Rows::kColumns <= 128 ? 3 : 1)
    attend_kernel(const __grid_constant__ AttendCall call) {
  __shared__ Plan plan;
  __shared__ Found<Rows::kColumns> found;
  const Block block = find_block(call);
  Rows rows(call, block);  // whose queries are on their way while the plan is made
  make_plan(call.args, block, plan);
  if (call.args.appends() && block.split == 0) {
    store_appended<Element>(call.args, block, plan);
  }
  const int branches = call.args.branches, warp = static_cast<int>(threadIdx.x / 32);
  const int64_t tiles = plan.first_tile[branches];
  const int splits = call.choice.splits;
  const auto begin = static_cast<int32_t>(tiles * block.split / splits);
  const auto end = static_cast<int32_t>(tiles * (block.split + 1) / splits);
  int branch = 0;
  for (int32_t i = begin + warp; i < end; i += kWarps) {
    while (i >= plan.first_tile[branch + 1]) {
      ++branch;
    }
    rows.take({plan, branch, static_cast<int64_t>(i - plan.first_tile[branch]) * kTileKeys});
  }
  rows.write(&found.sums[warp][0][0], found.max[warp], found.denominator[warp]);
  __syncthreads();
  write_block<Element>(call, block, found);
}

__device__ inline void advance(const DecodeStepArgs& args, int64_t batch) {
  args.lengths_after[batch] = args.lengths[batch] + count_of(args, batch);
}

/// A block for each query of a head: a warp takes every kWarps-th split. Lengths count an appended
/// position from here on, which all blocks that read them before have left behind.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ AttendCall call) {
  constexpr int kPerWarp = kMostSplits / kWarps, kSteps = 256 / 32;
  const DecodeStepArgs& args = call.args;
  const int splits = call.choice.splits, head_dim = static_cast<int>(args.head_dim);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t first_split = static_cast<int64_t>(blockIdx.x) * splits;
  __shared__ float parts[kWarps][32 * kSteps];
  const float lse = lane < splits ? call.split_lse[first_split + lane] : negative_infinity();
  float max = lse;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, lanes));
  }
  const float weight = exp2_approx(lse - (max == negative_infinity() ? 0.0f : max));
  float denominator = weight;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    denominator += __shfl_xor_sync(kAllLanes, denominator, lanes);
  }
  float weights[kPerWarp];
#pragma unroll
  for (int i = 0; i < kPerWarp; ++i) {
    weights[i] = __shfl_sync(kAllLanes, weight, warp + i * kWarps);
  }
#pragma unroll 4  // whose loads are under way together
  for (int step = 0; step < kSteps; ++step) {
    const int column = 32 * step + lane;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerWarp; ++i) {
      const int split = warp + i * kWarps;
      const bool is_part = split < splits && column < head_dim;
      const float part =
          is_part ? __ldg(call.split_sums + (first_split + split) * head_dim + column) : 0.0f;
      sum += weights[i] == 0.0f ? 0.0f : weights[i] * part;  // else it may be anything
    }
    parts[warp][column] = sum;
  }
  __syncthreads();
  const int64_t query = blockIdx.x / args.heads, head = blockIdx.x % args.heads;
  for (int column = static_cast<int>(threadIdx.x); column < head_dim; column += kThreads) {
    float sum = 0.0f;
    for (int other = 0; other < kWarps; ++other) {
      sum += parts[other][column];
    }
    write_result<Element>(args, query / args.queries, query % args.queries, head, column, sum,
                          {max, denominator});
  }
  if (args.appends() && head == 0 && threadIdx.x == 0) {
    advance(args, query);  // a step has one query a text
  }
}

__global__ void advance_kernel(const __grid_constant__ AttendCall call) {
  const int64_t batch = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (batch < call.args.batch) {
    advance(call.args, batch);
  }
}

}  // namespace dilated::kernels::cuda::decode

// The kernels of a step: blocks that walk their part of a head's tiles, and what puts the parts of
// a split head together.
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

/// out and lse of one query, from parts relative to maxima of their own, to base 2.
struct Whole {
  float max, denominator;
  __device__ float lse() const {
    return denominator > 0.0f ? max + log2_approx(denominator) : negative_infinity();
  }
};

template <typename Element>
__device__ void write_result(const DecodeAttendArgs& args, int64_t batch, int64_t index,
                             int64_t head, int column, float sum, const Whole& whole) {
  const float out = whole.denominator > 0.0f ? sum / whole.denominator : 0.0f;
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

template <typename Element, typename Rows>
__global__ void __launch_bounds__(kThreads, 1)
    attend_kernel(const __grid_constant__ AttendCall call) {
  __shared__ Plan plan;
  __shared__ Found<Rows::kColumns> found;
  const Block block = find_block(call);
  make_plan(call.args, block, plan);
  const int branches = call.args.branches, warp = static_cast<int>(threadIdx.x / 32);
  const int64_t tiles = plan.first_tile[branches];
  const int splits = call.choice.splits;
  const auto begin = static_cast<int32_t>(tiles * block.split / splits);
  const auto end = static_cast<int32_t>(tiles * (block.split + 1) / splits);
  Rows rows(call, block);
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

/// A block for each query of a head.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ AttendCall call) {
  const DecodeAttendArgs& args = call.args;
  const int splits = call.choice.splits;
  const float* lse = call.split_lse + static_cast<int64_t>(blockIdx.x) * splits;
  const float* sums = call.split_sums + static_cast<int64_t>(blockIdx.x) * splits * args.head_dim;
  __shared__ float weights[64];  // as many as a head has splits
  __shared__ Whole whole;
  if (threadIdx.x < 32) {
    const int first = static_cast<int>(threadIdx.x), second = first + 32;
    const float a = first < splits ? lse[first] : negative_infinity();
    const float b = second < splits ? lse[second] : negative_infinity();
    float max = fmaxf(a, b);
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, lanes));
    }
    const float base = max == negative_infinity() ? 0.0f : max;
    weights[first] = exp2_approx(a - base);
    weights[second] = exp2_approx(b - base);
    float sum = weights[first] + weights[second];
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    }
    if (first == 0) {
      whole = {max, sum};
    }
  }
  __syncthreads();
  const int64_t query = blockIdx.x / args.heads, head = blockIdx.x % args.heads;
  for (int column = threadIdx.x; column < args.head_dim; column += kThreads) {
    float sum = 0.0f;
#pragma unroll 8
    for (int split = 0; split < splits; ++split) {
      const float part = __ldg(sums + split * args.head_dim + column);
      sum += weights[split] > 0.0f ? weights[split] * part : 0.0f;  // else it may be anything
    }
    write_result<Element>(args, query / args.queries, query % args.queries, head, column, sum,
                          whole);
  }
}

}  // namespace dilated::kernels::cuda::decode

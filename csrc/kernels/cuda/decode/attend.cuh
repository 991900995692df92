// The kernels of a step: blocks that walk their part of a head's tiles, and what puts the parts of
// a split head together. A step that appends reads the new position from where it is given, so that
// no block waits for the one that writes it into the cache.
#pragma once

#include "kernels/cuda/decode/plan.cuh"
#include "kernels/cuda/primitives/numerics.cuh"
#include "kernels/cuda/primitives/overlap.cuh"

namespace dilated::kernels::cuda::decode {

/// What a block's warps found, in shared memory.
template <int kWarps, int kColumns>
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
template <typename Element, int kWarps, int kColumns>
__device__ void write_block(const AttendCall& call, const Block& block,
                            const Found<kWarps, kColumns>& found) {
  const DecodeAttendArgs& args = call.args;
  const auto head_dim = static_cast<int>(args.head_dim);
  for (int i = threadIdx.x; i < block.heads * head_dim; i += 32 * kWarps) {
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

/// What the block's heads keep of an appended position, a warp for each branch.
template <typename Element, typename Piece>
__device__ void store_appended(const DecodeStepArgs& args, const Block& block, const Plan& plan) {
  if (args.lengths[block.batch] + count_of(args, block.batch) > args.max_seq_len) {
    __trap();
  }
  const auto pieces = static_cast<int>(args.head_dim * sizeof(Element) / sizeof(Piece));
  const auto copy = [&](const kernels::Rows& from, const MutableRows& to, int64_t row, int piece) {
    reinterpret_cast<Piece*>(row_at<Element>(to, block.batch, row, 0))[piece] =
        reinterpret_cast<const Piece*>(row_at<Element>(from, block.batch, 0, block.kv_head))[piece];
  };
  const auto warp = static_cast<int>(threadIdx.x / 32), warps = static_cast<int>(blockDim.x / 32);
  for (int branch = warp; branch < args.branches; branch += warps) {
    const int64_t row = plan.new_row[branch];
    if (row < 0 || row >= args.rows) {
      continue;
    }
    for (auto i = static_cast<int>(threadIdx.x % 32); i < 2 * pieces; i += 32) {
      if (i < pieces) {
        copy(args.new_key, args.key_rows, row, i);
      } else {
        copy(args.new_value, args.value_rows, row, i - pieces);
      }
    }
  }
}

template <typename Element, typename Rows>
__global__ void __launch_bounds__(32 * Rows::kWarps, Rows::kColumns <= 128 ? 2 : 1)
    attend_kernel(const __grid_constant__ AttendCall call) {
  __shared__ Plan plan;
  __shared__ Found<Rows::kWarps, Rows::kColumns> found;
  const Block block = find_block(call);
  Rows rows(call, block);  // whose queries are on their way while the plan is made
  make_plan(call.args, block, plan);
  const int branches = call.args.branches, warp = static_cast<int>(threadIdx.x / 32);
  const auto tiles = static_cast<uint32_t>(plan.first_tile[branches]);
  const auto splits = static_cast<uint32_t>(call.choice.splits);
  const auto split = static_cast<uint32_t>(block.split);
  const uint32_t each = tiles / splits, longer = tiles % splits;
  const uint32_t begin = split * each + min(split, longer);
  const uint32_t end = begin + each + (split < longer ? 1 : 0);
  int branch = 0;
  for (auto i = static_cast<int32_t>(begin) + warp; i < static_cast<int32_t>(end);
       i += Rows::kWarps) {
    while (i >= plan.first_tile[branch + 1]) {
      ++branch;
    }
    rows.take({plan, branch, static_cast<int64_t>(i - plan.first_tile[branch]) * kTileKeys});
  }
  let_next_start();
  if (call.args.appends() && block.split == 0) {
    store_appended<Element, typename Rows::Piece>(call.args, block, plan);
  }
  rows.write(&found.sums[warp][0][0], found.max[warp], found.denominator[warp]);
  __syncthreads();
  write_block<Element>(call, block, found);
}

__device__ inline void advance(const DecodeStepArgs& args, int64_t batch) {
  args.lengths_after[batch] = args.lengths[batch] + count_of(args, batch);
}

inline constexpr int kCombineThreads = 128;

/// A block for each query of a head, whose loads are all under way together. Lengths count an
/// appended position from here on, which all blocks that read them before have left behind.
template <typename Element>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ AttendCall call) {
  const DecodeStepArgs& args = call.args;
  const int splits = call.choice.splits, head_dim = static_cast<int>(args.head_dim);
  const auto heads = static_cast<uint32_t>(args.heads);
  const auto queries = static_cast<uint32_t>(args.queries);
  const uint32_t query = blockIdx.x / heads, head = blockIdx.x % heads;
  const int64_t first_split = static_cast<int64_t>(blockIdx.x) * splits;
  wait_for_previous();
  for (int column = static_cast<int>(threadIdx.x); column < head_dim; column += kCombineThreads) {
    float lse[kMostSplits], parts[kMostSplits];
#pragma unroll
    for (int i = 0; i < kMostSplits; ++i) {
      const int64_t split = first_split + i;
      lse[i] = i < splits ? call.split_lse[split] : negative_infinity();
      parts[i] = i < splits ? call.split_sums[split * head_dim + column] : 0.0f;
    }
    Whole whole{negative_infinity(), 0.0f};
    for (const float of_split : lse) {
      whole.max = fmaxf(whole.max, of_split);
    }
    const float base = whole.max == negative_infinity() ? 0.0f : whole.max;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMostSplits; ++i) {
      const float weight = exp2_approx(lse[i] - base);
      whole.denominator += weight;
      sum += weight == 0.0f ? 0.0f : weight * parts[i];  // else it may be anything
    }
    write_result<Element>(args, query / queries, query % queries, head, column, sum, whole);
  }
  if (args.appends() && head == 0 && threadIdx.x == 0) {
    advance(args, query);  // a step has one query a text
  }
}

__global__ void advance_kernel(const __grid_constant__ AttendCall call) {
  wait_for_previous();
  const int64_t batch = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (batch < call.args.batch) {
    advance(call.args, batch);
  }
}

}  // namespace dilated::kernels::cuda::decode

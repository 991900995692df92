// What a block's query heads meet, worked out from the position that the device holds: the rows of
// each branch, their tiles, and which of them count more than once.
#pragma once

#include "kernels/cuda/decode/choose.h"

namespace dilated::kernels::cuda::decode {

inline constexpr int kMostHeads = 8;  // of a block

/// A call as its blocks see it.
struct AttendCall {
  DecodeStepArgs args;
  Choice choice;
  float* split_sums;  // [queries, heads, splits, head_dim], where there is more than one split
  float* split_lse;   // [queries, heads, splits], base 2
};

/// Heads `first_head` to + heads of one KV head, of query `index` of a text; a range of their
/// tiles.
struct Block {
  int32_t batch, index, kv_head, first_head, heads, split;
};

__device__ inline Block find_block(const AttendCall& call) {
  const DecodeAttendArgs& args = call.args;
  const auto group = static_cast<uint32_t>(args.heads / args.kv_heads);
  const auto heads = static_cast<uint32_t>(call.choice.heads);
  const uint32_t parts = (group + heads - 1) / heads;
  uint32_t rest = blockIdx.x;
  const auto take = [&](uint32_t count) {
    const uint32_t taken = rest % count;
    rest /= count;
    return taken;
  };
  Block block;
  block.split = static_cast<int32_t>(take(static_cast<uint32_t>(call.choice.splits)));
  const uint32_t part = take(parts);
  block.kv_head = static_cast<int32_t>(take(static_cast<uint32_t>(args.kv_heads)));
  block.index = static_cast<int32_t>(take(static_cast<uint32_t>(args.queries)));
  block.batch = static_cast<int32_t>(rest);
  block.first_head =
      block.kv_head * static_cast<int32_t>(group) + static_cast<int32_t>(part * heads);
  block.heads = static_cast<int32_t>(min(heads, group - part * heads));
  return block;
}

struct Plan {
  Lattice lattices[kMostBranches][kMostHeads];
  LatticeRows rows[kMostBranches];
  int32_t first_tile[kMostBranches + 1];  // of each branch; the last: of all
  uint32_t members[kMostBranches];        // heads whose lattice holds the query, a bit each
  // The branches whose lattices nest in this one and hold the query, a bit each.
  uint32_t outer[kMostBranches][kMostHeads];
  uint32_t any_outer[kMostBranches];
  Divisor steps[kMostBranches][kMostBranches];  // of an outer lattice within an inner one
  int64_t new_row[kMostBranches];               // where the cache keeps what a step appends, or -1
};

static_assert(32 * warps_of(256) >= kMostBranches * kMostHeads, "a thread for each lattice");

/// All threads of the block call.
__device__ inline void make_plan(const DecodeStepArgs& args, const Block& block, Plan& plan) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int branch = thread / kMostHeads, head = thread % kMostHeads;
  const bool is_lattice = branch < args.branches && head < block.heads;
  const int64_t length = args.lengths[block.batch], count = count_of(args, block.batch);
  const Lattice lattice =
      is_lattice ? args.lattices[branch * args.heads + block.first_head + head] : Lattice{};
  // While the loads are under way:
  for (int i = thread; i < args.branches * args.branches; i += threads) {
    const int inner = i / args.branches, outer = i - inner * args.branches;
    const auto rate = static_cast<uint32_t>(args.dilation_rates[outer]);
    const uint32_t step = rate / static_cast<uint32_t>(args.dilation_rates[inner]);
    plan.steps[inner][outer] = make_divisor(max(step, 1u));  // of those that nest, the others idle
  }
  if (branch < kMostBranches) {
    plan.outer[branch][head] = 0;
    if (head == 0) {
      plan.members[branch] = 0;
      plan.rows[branch] = {};
      plan.new_row[branch] = -1;
    }
  }
  if (is_lattice) {
    plan.lattices[branch][head] = lattice;
  }
  __syncthreads();
  const int64_t position = length + block.index - (args.appends() ? 0 : count);
  const LatticeRows rows = is_lattice && block.index < count && position >= 0
                               ? rows_met(args, args.forgets, branch, lattice, position)
                               : LatticeRows{};
  if (rows.step != 0) {
    // Heads that are here together have one lattice, so all of them write the same.
    plan.rows[branch] = rows;
    const bool is_kept =
        lattice.offset + rows.distance * args.dilation_rates[branch] < lattice.kept;
    plan.new_row[branch] = is_kept ? lattice.first + rows.distance : -1;
    atomicOr(&plan.members[branch], 1u << head);
    for (int64_t inner = lattice.parent; inner >= 0; inner = plan.lattices[inner][head].parent) {
      atomicOr(&plan.outer[inner][head], 1u << branch);
    }
  }
  __syncthreads();
  if (thread < args.branches) {
    uint32_t any = 0;
    for (int other = 0; other < kMostHeads; ++other) {
      any |= plan.outer[thread][other];
    }
    plan.any_outer[thread] = any;
  }
  if (thread == 0) {
    int32_t tiles = 0;
    for (int of = 0; of < args.branches; ++of) {
      plan.first_tile[of] = tiles;
      tiles += static_cast<int32_t>((plan.rows[of].count + kTileKeys - 1) / kTileKeys);
    }
    plan.first_tile[args.branches] = tiles;
  }
  __syncthreads();
}

/// A tile of a branch's rows, as a warp takes it.
struct Tile {
  const Plan& plan;
  int branch;
  int64_t first;  // of its rows, among those of the branch

  __device__ bool has(int key) const { return first + key < plan.rows[branch].count; }

  /// A key's row, which a step that appends it does not find in the cache yet. Keys past the last
  /// stand for the last, so that every load is of a row.
  template <typename Element>
  __device__ const Element* row(const Rows& cache, const Rows& appended, const Block& block,
                                int key) const {
    const LatticeRows& rows = plan.rows[branch];
    const int64_t place = min(first + key, rows.count - 1);
    return appended.data != nullptr && place == rows.distance
               ? row_at<Element>(appended, block.batch, block.index, block.kv_head)
               : row_at<Element>(cache, block.batch, rows.first + place * rows.step, block.kv_head);
  }

  /// The outer lattices that hold the key too, a bit each.
  __device__ uint32_t outer_of(int key) const {
    const auto distance = static_cast<uint32_t>(plan.rows[branch].distance - first - key);
    uint32_t holding = 0;
    for (uint32_t rest = plan.any_outer[branch]; rest != 0; rest &= rest - 1) {
      const int other = __ffs(static_cast<int>(rest)) - 1;
      holding |= plan.steps[branch][other].divides(distance) ? 1u << other : 0;
    }
    return holding;
  }

  __device__ bool has_head(int head) const { return (plan.members[branch] >> head & 1) != 0; }

  /// How many of the head's lattices hold a key of these outer ones.
  __device__ float multiplicity(uint32_t holding, int head) const {
    return static_cast<float>(1 + __popc(holding & plan.outer[branch][head]));
  }
};

}  // namespace dilated::kernels::cuda::decode

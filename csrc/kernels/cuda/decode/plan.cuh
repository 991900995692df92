// What a block's query heads meet, worked out from the position that the device holds: the rows of
// each branch, their tiles, and which of them count more than once.
#pragma once

#include "kernels/cuda/decode/choose.h"

namespace dilated::kernels::cuda::decode {

inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kMostHeads = 8;  // of a block

/// A call as its blocks see it.
struct AttendCall {
  DecodeAttendArgs args;
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
  LatticeRows rows[kMostBranches];
  int32_t first_tile[kMostBranches + 1];  // of each branch; the last: of all
  uint32_t members[kMostBranches];        // heads whose lattice holds the query, a bit each
  // The branches whose lattices nest in this one and hold the query, a bit each.
  uint32_t outer[kMostBranches][kMostHeads];
  uint32_t any_outer[kMostBranches];
};

/// All threads of the block call.
__device__ inline void make_plan(const DecodeAttendArgs& args, const Block& block, Plan& plan) {
  const int branches = args.branches;
  for (int i = threadIdx.x; i < kMostBranches * kMostHeads; i += kThreads) {
    (&plan.outer[0][0])[i] = 0;
    plan.members[i % kMostBranches] = 0;
    plan.rows[i % kMostBranches] = {};
  }
  __syncthreads();
  const int64_t count = count_of(args, block.batch);
  const int64_t position = args.lengths[block.batch] - count + block.index;
  const bool exists = block.index < count && position >= 0;
  for (int i = threadIdx.x; exists && i < branches * block.heads; i += kThreads) {
    const int branch = i / block.heads, head = i - branch * block.heads;
    const Lattice* of_head = args.lattices + block.first_head + head;
    const Lattice lattice = of_head[branch * args.heads];
    const LatticeRows rows = rows_met(args, args.forgets, branch, lattice, position);
    if (rows.step == 0) {
      continue;
    }
    // Heads that are here together have one lattice, so all of them write the same.
    plan.rows[branch] = rows;
    atomicOr(&plan.members[branch], 1u << head);
    for (int64_t inner = lattice.parent; inner >= 0; inner = of_head[inner * args.heads].parent) {
      atomicOr(&plan.outer[inner][head], 1u << branch);
    }
  }
  __syncthreads();
  if (threadIdx.x < branches) {
    uint32_t any = 0;
    for (int head = 0; head < kMostHeads; ++head) {
      any |= plan.outer[threadIdx.x][head];
    }
    plan.any_outer[threadIdx.x] = any;
  }
  if (threadIdx.x == 0) {
    int32_t tiles = 0;
    for (int branch = 0; branch < branches; ++branch) {
      plan.first_tile[branch] = tiles;
      tiles += static_cast<int32_t>((plan.rows[branch].count + kTileKeys - 1) / kTileKeys);
    }
    plan.first_tile[branches] = tiles;
  }
  __syncthreads();
}

/// A tile of a branch's rows, as a warp takes it.
struct Tile {
  const Plan& plan;
  int branch;
  int64_t first;  // of its rows, among those of the branch

  __device__ bool has(int key) const { return first + key < plan.rows[branch].count; }

  /// A row of the cache; keys past the last stand for the last, so that every load is of a row.
  __device__ int64_t row(int key) const {
    const LatticeRows& rows = plan.rows[branch];
    return rows.first + min(first + key, rows.count - 1) * rows.step;
  }

  /// The outer lattices that hold the key too, a bit each.
  __device__ uint32_t outer_of(const DecodeArgs& args, int key) const {
    const auto distance = static_cast<uint32_t>(plan.rows[branch].distance - first - key);
    const auto rate = static_cast<uint32_t>(args.dilation_rates[branch]);
    uint32_t holding = 0;
    for (uint32_t rest = plan.any_outer[branch]; rest != 0; rest &= rest - 1) {
      const int other = __ffs(static_cast<int>(rest)) - 1;
      const auto ratio = static_cast<uint32_t>(args.dilation_rates[other]) / rate;
      holding |= distance % ratio == 0 ? 1u << other : 0;
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

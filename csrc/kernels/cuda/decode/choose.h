// Which kernel attends a step, over how many blocks the keys of a head are split: decided here
// alone, from what the host knows. Where a text ends, only the device does.
#pragma once

#include "kernels/cuda/choose.h"
#include "kernels/decode.h"

namespace dilated::kernels::cuda::decode {

inline constexpr int32_t kTileKeys = 16;  // that a warp takes at once
inline constexpr int32_t kMostSplits = 32;

/// Of a block, which take tiles in turn: two such blocks fit on a multiprocessor.
constexpr int32_t warps_of(int32_t width) { return width <= 128 ? 8 : 4; }

enum class Family {
  kTensorCores,  // 16-bit rows that begin at multiples of 16 bytes, head_dim a multiple of 8
  kScalar,       // float32 arithmetic, any row
};

struct Problem {
  Dtype dtype;
  int64_t head_dim;  // at most 256
  bool is_aligned;   // rows begin at multiples of 16 bytes
  int64_t queries;   // of all texts
  int64_t heads, kv_heads;
  int64_t rows;  // that a query meets at most
};

struct Choice {
  Family family;
  int32_t width;   // head_dim, padded to what a kernel is compiled for
  int32_t heads;   // query heads of a block: of one KV head, whose rows they share
  int32_t splits;  // blocks among which the rows of such heads are divided; 1: no combine
  bool overlaps;   // a launch may start while the one before it ends (overlap.cuh)
};

Choice choose(const Problem& problem, const Device& device);

/// The most rows that a query of the call can meet.
int64_t most_rows(const DecodeAttendArgs& args);

}  // namespace dilated::kernels::cuda::decode

// Which kernels run a call, in which shape and with what memory: decided here alone, once a call,
// from the call and the device. Nothing of CUDA, so that each choice is tested on any machine.
#pragma once

#include <dilated/pattern.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "kernels/attention.h"

namespace dilated::kernels::cuda {

/// A folder of kernels.
enum class Family {
  kPortable,  // float16 and bfloat16 on tensor cores, from sm_80 on
  kHopper,    // the same, in instructions of sm_90a
  kScalar,    // float32 arithmetic without tensor cores, from sm_80 on
};

inline constexpr size_t kLeastSharedBytes = 101376;  // that a block can have from sm_80 on

struct Device {
  int32_t compute_capability;  // 10 * major + minor
  int32_t multiprocessors;
  size_t shared_bytes;  // that a block may have
  bool has_hopper;      // it runs sm_90a's instructions, and this library has such kernels
};

/// What a choice depends on of a call.
struct Problem {
  Dtype dtype;
  int64_t head_dim;  // at most 256
  bool is_causal;
  bool is_deterministic;
  int32_t row_tile = kRowTile;  // of the pattern
};

struct ForwardProblem : Problem {
  int64_t rows;      // of queries, of all heads and batch entries
  bool is_mappable;  // rows are aligned to 16 bytes; tensor maps can describe keys and values
  std::span<const int64_t> dilation_rates;
  bool has_far_keys = false;
};

struct BackwardProblem : Problem {
  bool is_mappable;  // the same, of queries and grad_out
  std::span<const int64_t> dilation_rates;
};

/// Strides, within which a pattern's keys lie.
struct ListStrides {
  static constexpr int32_t kMost = 12, kLongest = 1 << 16;
  int32_t count;
  int32_t stride[kMost];
};

/// Query rows by keys in the forward, keys by query rows in the backward.
struct BlockTile {
  int32_t rows;     // which a block keeps
  int32_t columns;  // which it walks along, so many at a time
};

struct ForwardChoice {
  Family family;
  int32_t width;     // head_dim, padded to what a kernel is compiled for
  int32_t row_tile;  // rows of the pattern's tiles, of which a block takes one or several
  BlockTile tile;
  int32_t stages;       // tiles of columns in shared memory
  size_t shared_bytes;  // of a block
  int32_t max_blocks;   // which take one tile after another; 0: no bound
  bool has_counter;     // from which they take them, as there are more than blocks
  ListStrides strides;  // which the kernel copies at once; none: it copies rows one by one
};

struct BackwardChoice {
  Family family;
  int32_t width, row_tile;
  BlockTile tile;
  int32_t stages;
  size_t shared_bytes;
  int32_t max_blocks;   // which take tiles from a counter; 0: no counter, one block a tile
  int32_t sums_width;   // columns of float32 sums, a row for each query, to which blocks add
                        // grad_query in any order; 0: every row of grad_query is written once
  ListStrides strides;  // which the kernel copies at once; none: it copies rows one by one
};

ForwardChoice choose_forward(const ForwardProblem& problem, const Device& device);

/// sums_width does not depend on is_causal: the blocks of a ring add to the same sums.
BackwardChoice choose_backward(const BackwardProblem& problem, const Device& device);

/// The text of DILATED_SHARED_MEMORY_BYTES; nothing unless it is a number, at least
/// kLeastSharedBytes.
std::optional<size_t> parse_shared_bytes(std::string_view text);

}  // namespace dilated::kernels::cuda

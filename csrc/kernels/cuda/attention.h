// Attention on CUDA devices. Launches on `stream` without waiting, on the current device; every
// pointer is to its memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/choose.h"

namespace dilated::kernels::cuda {

/// What a pattern must be: planned for the specification of this fingerprint, with these tables
/// (directions_of), and tiles whose rows divide these.
struct RequiredPattern {
  uint64_t fingerprint;
  int32_t directions;
  RowTiles row_tiles;
};

/// Makes the stream fail, with a message, unless the words are as plan() made them, and so. The
/// pattern begins at a multiple of 16 bytes.
cudaError_t require_pattern(const int32_t* pattern, int64_t words, const RequiredPattern& required,
                            cudaStream_t stream);

/// found[0]: 1 if the words are as plan() made them, else 0; found[1]: the fingerprint in their
/// header; found[2]: its directions_of(); found[3], found[4]: its row_tiles_of().
cudaError_t read_pattern(const int32_t* pattern, int64_t words, int64_t* found,
                         cudaStream_t stream);

/// counter: zero; may be null unless choice.has_counter.
cudaError_t attention_forward(const ForwardChoice& choice, const ForwardArgs& args,
                              unsigned long long* counter, cudaStream_t stream);

/// delta[b, h, n] = sum_d grad_out * out - grad_lse; grad_lse may be null.
cudaError_t attention_delta(const BackwardArgs& args, const Rows& out, const float* grad_lse,
                            float* delta, cudaStream_t stream);

/// A backward's workspace; a pointer that its choice does not use may be null.
struct BackwardWorkspace {
  float* query_sums;            // [batch, heads, queries, sums_width], aligned to 16 bytes
  unsigned long long* counter;  // zero
};

/// Writes grad_key and grad_value. If the choice has sums, adds grad_query / scale to them, their
/// columns in the order of QuerySums; else writes grad_query.
cudaError_t attention_backward(const BackwardChoice& choice, const BackwardArgs& args,
                               const BackwardWorkspace& workspace, cudaStream_t stream);

/// [batch, queries, heads, head_dim] of `dtype`: scale * sums.
struct RoundedSums {
  Dtype dtype;
  int64_t batch, queries, heads, head_dim;
  float scale;
  MutableRows grad_query;
};
cudaError_t round_query_sums(const RoundedSums& rounded, const float* sums, cudaStream_t stream);

}  // namespace dilated::kernels::cuda

// Attention on CUDA devices. Launches on `stream` without waiting; every pointer is to device
// memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attention.h"

namespace dilated::kernels::cuda {

inline constexpr size_t kSharedBytes = 101376;  // that a block may have on every GPU from sm_80 on

/// Makes the stream fail, with a message, unless so many words are as plan() made them for the
/// specification of this fingerprint, with these tables (directions_of). The pattern begins at a
/// multiple of 16 bytes.
cudaError_t require_pattern(const int32_t* pattern, int64_t words, uint64_t fingerprint,
                            int32_t directions, cudaStream_t stream);

/// found[0]: 1 if so many words are as plan() made them, else 0; found[1]: the fingerprint in
/// their header; found[2]: directions_of() it.
cudaError_t read_pattern(const int32_t* pattern, int64_t words, int64_t* found,
                         cudaStream_t stream);

cudaError_t attention_forward(const ForwardArgs& args, cudaStream_t stream);

/// delta[b, h, n] = sum_d grad_out * out - grad_lse; grad_lse may be null.
cudaError_t attention_delta(const BackwardArgs& args, const Rows& out, const float* grad_lse,
                            float* delta, cudaStream_t stream);

/// Whether attention_backward adds grad_query up in float32, block by block in any order, on the
/// current device; otherwise it writes every row once. shared_bytes: see attention_backward.
cudaError_t backward_adds_up(Dtype dtype, int64_t head_dim, bool deterministic, size_t shared_bytes,
                             bool& adds_up);

/// Writes grad_key and grad_value; adds grad_query / scale to `sums`, rows of
/// query_sums_width(head_dim) columns in an order of their own, aligned to 16 bytes. Null, where
/// nothing is added up: writes grad_query. counter: zero; not used for float32. shared_bytes: most
/// that a block may have of the device's shared memory, at least kSharedBytes.
cudaError_t attention_backward(const BackwardArgs& args, float* sums, unsigned long long* counter,
                               size_t shared_bytes, cudaStream_t stream);

/// [batch, queries, heads, head_dim] of `dtype`: scale * sums.
struct RoundedSums {
  Dtype dtype;
  int64_t batch, queries, heads, head_dim;
  float scale;
  MutableRows grad_query;
};
cudaError_t round_query_sums(const RoundedSums& rounded, float* sums, cudaStream_t stream);

}  // namespace dilated::kernels::cuda

// Attention on CUDA devices. Launches on `stream` without waiting; every pointer is to device
// memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attention.h"

namespace dilated::kernels::cuda {

/// Makes the stream fail, with a message, unless the pattern's header has this fingerprint.
cudaError_t compare_fingerprint(const int32_t* pattern, uint64_t fingerprint, cudaStream_t stream);

cudaError_t attention_forward(const ForwardArgs& args, cudaStream_t stream);

/// delta[b, h, n] = sum_d grad_out * out - grad_lse; grad_lse may be null.
cudaError_t attention_delta(const BackwardArgs& args, const Rows& out, const float* grad_lse,
                            float* delta, cudaStream_t stream);

/// Bytes that attention_backward needs beside its outputs: at most a float32 accumulator of query's
/// size.
size_t attention_backward_workspace(const BackwardArgs& args, bool deterministic);

cudaError_t attention_backward(const BackwardArgs& args, void* workspace, bool deterministic,
                               cudaStream_t stream);

}  // namespace dilated::kernels::cuda

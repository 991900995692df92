// float16 and bfloat16 in instructions of sm_90a: wgmma, TMA. Built where that architecture is.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/attention.h"

namespace dilated::kernels::cuda::hopper {

/// Whether the library has these kernels, and the driver what they need.
bool is_available();

cudaError_t attention_forward(const ForwardChoice& choice, const ForwardArgs& args,
                              unsigned long long* counter, cudaStream_t stream);

cudaError_t attention_backward(const BackwardChoice& choice, const BackwardArgs& args,
                               const BackwardWorkspace& workspace, cudaStream_t stream);

}  // namespace dilated::kernels::cuda::hopper

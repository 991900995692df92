// float32 arithmetic without tensor cores, and no atomics, so the same bits on every run. float32
// tensors; in the backward 16-bit ones too where the tiles of the portable family do not fit.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/attention.h"

namespace dilated::kernels::cuda::scalar {

cudaError_t attention_forward(const ForwardChoice& choice, const ForwardArgs& args,
                              cudaStream_t stream);
cudaError_t attention_backward(const BackwardChoice& choice, const BackwardArgs& args,
                               cudaStream_t stream);

}  // namespace dilated::kernels::cuda::scalar

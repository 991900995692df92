// float16 and bfloat16 on tensor cores (mma.sync), for any GPU from sm_80 on.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/attention.h"

namespace dilated::kernels::cuda::portable {

cudaError_t attention_forward(const ForwardChoice& choice, const ForwardArgs& args,
                              cudaStream_t stream);
cudaError_t attention_backward(const BackwardChoice& choice, const BackwardArgs& args,
                               const BackwardWorkspace& workspace, cudaStream_t stream);

}  // namespace dilated::kernels::cuda::portable

// In place of this family where the library is not built for sm_90a.
#include "kernels/cuda/hopper/attention.h"

namespace dilated::kernels::cuda::hopper {

bool is_available() { return false; }

cudaError_t attention_forward(const ForwardChoice& /*choice*/, const ForwardArgs& /*args*/,
                              unsigned long long* /*counter*/, cudaStream_t /*stream*/) {
  return cudaErrorNotSupported;
}

cudaError_t attention_backward(const BackwardChoice& /*choice*/, const BackwardArgs& /*args*/,
                               const BackwardWorkspace& /*workspace*/, cudaStream_t /*stream*/) {
  return cudaErrorNotSupported;
}

}  // namespace dilated::kernels::cuda::hopper

// Decoding on CUDA devices. Launches on `stream` without waiting, and reads nothing on the host;
// every pointer is to device memory.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/decode/choose.h"

namespace dilated::kernels::cuda::decode {

/// Floats of the workspace that attend() takes; none where it has no splits to combine.
int64_t workspace_size(const DecodeAttendArgs& args, const Choice& choice);

cudaError_t attend(const DecodeAttendArgs& args, const Choice& choice, float* workspace,
                   cudaStream_t stream);

/// A text that would have more than max_seq_len positions stops the device.
cudaError_t append(const DecodeAppendArgs& args, cudaStream_t stream);

}  // namespace dilated::kernels::cuda::decode

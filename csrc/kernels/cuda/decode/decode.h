// Decoding on CUDA devices. Launches on `stream` without waiting, and reads nothing on the host;
// every pointer is to device memory.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/decode/choose.h"

namespace dilated::kernels::cuda::decode {

/// Floats of the workspace that step() takes; none where it has no splits to combine.
int64_t workspace_size(const DecodeAttendArgs& args, const Choice& choice);

/// Attends; where args.appends(), the one position that it appends first, lengths being those
/// before.
cudaError_t step(const DecodeStepArgs& args, const Choice& choice, float* workspace,
                 cudaStream_t stream);

/// A text that would have more than max_seq_len positions stops the device.
cudaError_t append(const DecodeAppendArgs& args, cudaStream_t stream);

}  // namespace dilated::kernels::cuda::decode

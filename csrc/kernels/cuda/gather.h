// gather and scatter on CUDA devices. Launches on `stream` without waiting; every pointer is to
// device memory.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/gather.h"

namespace dilated::kernels::cuda {

/// Writes all of `packed`.
cudaError_t gather(const GatherForwardArgs& args, const InlineOffsets& offsets,
                   cudaStream_t stream);

/// Copies, or adds in float32 (float64 for float64) and rounds once. No two slots share a row, so
/// the result is deterministic.
cudaError_t scatter(const ScatterArgs& args, const InlineOffsets& offsets, cudaStream_t stream);

}  // namespace dilated::kernels::cuda

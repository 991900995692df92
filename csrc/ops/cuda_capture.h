// CUDA graphs: whether one is being captured.
#pragma once

#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

namespace dilated::ops {

/// Whether a graph captures the current stream. The default stream can't be captured, so the driver
/// isn't asked.
inline bool is_capturing() {
  return c10::cuda::getCurrentCUDAStream().stream() != nullptr &&
         c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

}  // namespace dilated::ops

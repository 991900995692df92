// A launch that starts while the one before it in its stream still runs: programmatic dependent
// launch, which devices have from sm_90 on. Elsewhere it waits, as any launch does.
#pragma once

#include <cuda_runtime.h>

namespace dilated::kernels::cuda {

/// The next launch may start once all blocks of this one have come here or ended.
__device__ inline void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/// Until the launch before this one is done and what it wrote can be read.
__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

/// overlaps: the device can, and the kernel calls wait_for_previous() before it reads or writes.
template <typename Call>
cudaError_t launch_next(void (*kernel)(Call), const Call& call, int64_t blocks, int threads,
                        bool overlaps, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = static_cast<unsigned>(threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, call);
}

}  // namespace dilated::kernels::cuda

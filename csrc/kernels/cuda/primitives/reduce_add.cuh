// Adds to float32 numbers in global memory, from many blocks at once. The order of the additions is
// not defined.
#pragma once

#include <cuda_runtime.h>

namespace dilated::kernels::cuda {

/// Four neighbours, aligned to 16 bytes: one request on sm_90 and later.
__device__ inline void reduce_add_4(float* address, const float4& values) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(values.x),
               "f"(values.y), "f"(values.z), "f"(values.w)
               : "memory");
#else
  atomicAdd(address, values.x);
  atomicAdd(address + 1, values.y);
  atomicAdd(address + 2, values.z);
  atomicAdd(address + 3, values.w);
#endif
}

}  // namespace dilated::kernels::cuda

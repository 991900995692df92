// What every launch needs: how many blocks, of which element type, and more shared memory than a
// kernel has by default.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "kernels/attention.h"

namespace dilated::kernels::cuda {

/// One block for each of the pattern's tiles if they are full. Blocks that find nothing end at
/// once; where there are more tiles than that, blocks take several.
inline int64_t count_blocks(int64_t rows, int64_t heads, int64_t batch, int64_t row_tile) {
  const int64_t tiles = (rows + row_tile - 1) / row_tile * heads * batch;
  return tiles + tiles / 4 + 1;
}

/// run.operator()<Element>() for the 16-bit type.
template <typename Run>
cudaError_t with_16_bit(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::kFloat16:
      return run.template operator()<__half>();
    case Dtype::kBFloat16:
      return run.template operator()<__nv_bfloat16>();
    default:
      return cudaErrorInvalidValue;
  }
}

/// On the current device, whose driver is asked once for each kernel: `shared_bytes` is the same in
/// every launch of a kernel on a device. `blocks` is cut to what a grid can have.
template <auto kKernel, typename Call>
cudaError_t launch_kernel(const Call& call, int64_t blocks, int threads, size_t shared_bytes,
                          cudaStream_t stream) {
  static std::atomic<uint64_t> prepared{0};  // a bit for each device
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (error == cudaSuccess && (prepared.load(std::memory_order_relaxed) & bit) == 0) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
    prepared.fetch_or(error == cudaSuccess ? bit : 0, std::memory_order_relaxed);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const auto grid =
      static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()));
  kKernel<<<grid, threads, shared_bytes, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace dilated::kernels::cuda

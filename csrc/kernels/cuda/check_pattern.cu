// Checks that a pattern on the device is as planned: any other could make kernels leave the
// tensors.
//
// For a pattern that it doesn't know, the host asks once and waits for the answer. In a CUDA graph
// it can't, so a replay stops the device, as PyTorch's kernels do at an index out of bounds. This
// is a kernel ahead of the call's own, which a call to __assert_fail would cost registers.
#include <dilated/pattern_layout.h>

#include "kernels/cuda/attention.h"

#if defined(NDEBUG)  // then nvcc does not declare what assert() calls
extern "C" __host__ __device__ void __assert_fail(const char* assertion, const char* file,
                                                  unsigned int line, const char* function) noexcept;
#endif

namespace dilated::kernels::cuda {
namespace {

constexpr int kThreads = 1024;

/// What is_planned() in dilated/pattern.h says, for all threads of the one block.
__device__ bool is_planned(const int32_t* pattern, int64_t words) {
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) {
    total = 0;
  }
  __syncthreads();
  const auto* units = reinterpret_cast<const ulonglong2*>(pattern);
  unsigned long long sum = 0;
#pragma unroll 4
  for (int64_t unit = threadIdx.x; unit < words / 4; unit += kThreads) {
    const ulonglong2 pairs = units[unit];
    sum += checksum_term(pairs.x, unit == kChecksumUnit ? 0 : pairs.y, unit);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sum += __shfl_down_sync(0xffffffff, sum, lanes);
  }
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&total, sum);
  }
  __syncthreads();
  const Header& header = PatternView{pattern}.header();
  return header.magic == kPatternMagic && header.words == words && words % 4 == 0 &&
         join(header.checksum) == total;
}

__global__ void __launch_bounds__(kThreads)
    require_pattern_kernel(const int32_t* pattern, int64_t words, RequiredPattern required) {
  const bool planned = is_planned(pattern, words);
  const Header& header = PatternView{pattern}.header();
  const auto [fingerprint, directions, row_tiles] = required;
  const RowTiles own = row_tiles_of(header);
  const bool same = join(header.fingerprint) == fingerprint &&
                    (directions_of(header) & directions) == directions &&
                    row_tiles.forward % max(own.forward, 1) == 0 &&
                    row_tiles.transposed % max(own.transposed, 1) == 0;
  if (threadIdx.x == 0 && !(planned && same)) {
    __assert_fail("pattern was planned for the arguments of this call", "dilated::attention", 0,
                  "require_pattern");
  }
}

__global__ void __launch_bounds__(kThreads)
    read_pattern_kernel(const int32_t* pattern, int64_t words, int64_t* found) {
  const bool planned = is_planned(pattern, words);
  if (threadIdx.x == 0) {
    found[0] = planned ? 1 : 0;
    const Header& header = PatternView{pattern}.header();
    found[1] = static_cast<int64_t>(join(header.fingerprint));
    found[2] = directions_of(header);
    found[3] = row_tiles_of(header).forward;
    found[4] = row_tiles_of(header).transposed;
  }
}

}  // namespace

cudaError_t require_pattern(const int32_t* pattern, int64_t words, const RequiredPattern& required,
                            cudaStream_t stream) {
  require_pattern_kernel<<<1, kThreads, 0, stream>>>(pattern, words, required);
  return cudaGetLastError();
}

cudaError_t read_pattern(const int32_t* pattern, int64_t words, int64_t* found,
                         cudaStream_t stream) {
  read_pattern_kernel<<<1, kThreads, 0, stream>>>(pattern, words, found);
  return cudaGetLastError();
}

}  // namespace dilated::kernels::cuda

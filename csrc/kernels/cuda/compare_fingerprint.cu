// Stops a call whose pattern was planned for another one: it would lead out of the tensors.
//
// The host cannot read the header without waiting for the device. So a kernel of one thread does,
// ahead of the call's kernels, and fails as PyTorch's do at an index out of bounds. It is a kernel
// of its own because the call to __assert_fail would cost the others registers.
#include <dilated/pattern_layout.h>

#include "kernels/cuda/attention.h"

#if defined(NDEBUG)  // then nvcc does not declare what assert() calls
extern "C" __host__ __device__ void __assert_fail(const char* assertion, const char* file,
                                                  unsigned int line, const char* function) noexcept;
#endif

namespace dilated::kernels::cuda {
namespace {

__global__ void compare_fingerprint_kernel(const int32_t* pattern, int64_t words, uint32_t low,
                                           uint32_t high) {
  const Header& header = PatternView{pattern}.header();
  if (header.magic != kPatternMagic || header.words != words || header.fingerprint[0] != low ||
      header.fingerprint[1] != high) {
    __assert_fail("pattern was planned for the arguments of this call", "dilated::attention", 0,
                  "compare_fingerprint");
  }
}

}  // namespace

cudaError_t compare_fingerprint(const int32_t* pattern, int64_t words, uint64_t fingerprint,
                                cudaStream_t stream) {
  compare_fingerprint_kernel<<<1, 1, 0, stream>>>(
      pattern, words, static_cast<uint32_t>(fingerprint), static_cast<uint32_t>(fingerprint >> 32));
  return cudaGetLastError();
}

}  // namespace dilated::kernels::cuda

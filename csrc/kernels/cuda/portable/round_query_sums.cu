// Rounds the sums that grad_query was added up in.
#include <cstdint>
#include <limits>

#include "kernels/cuda/portable/attention.h"
#include "kernels/cuda/portable/backward_sums.cuh"

namespace dilated::kernels::cuda::portable {
namespace {

template <typename Element>
cudaError_t round_sums(const RoundedSums& rounded, const float* sums, cudaStream_t stream) {
  const int64_t rows = rounded.batch * rounded.heads * rounded.queries;
  if (rows == 0) {
    return cudaSuccess;
  }
  constexpr int kThreads = 256;
  const auto width = static_cast<int32_t>(query_sums_width(rounded.head_dim));
  const int64_t blocks = (rows * (width / 16) + kThreads - 1) / kThreads;
  if (blocks > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidValue;
  }
  round_sums_kernel<Element><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      {sums, width}, rounded.grad_query, rounded.heads, rounded.queries, rows,
      static_cast<int32_t>(rounded.head_dim), rounded.scale);
  return cudaGetLastError();
}

}  // namespace

cudaError_t round_query_sums(const RoundedSums& rounded, const float* sums, cudaStream_t stream) {
  switch (rounded.dtype) {
    case Dtype::kFloat16:
      return round_sums<__half>(rounded, sums, stream);
    case Dtype::kBFloat16:
      return round_sums<__nv_bfloat16>(rounded, sums, stream);
    case Dtype::kFloat32:
      return round_sums<float>(rounded, sums, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace dilated::kernels::cuda::portable

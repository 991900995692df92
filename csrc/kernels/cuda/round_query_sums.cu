// Rounds the sums that grad_query was added up in.
#include <cstdint>
#include <limits>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/primitives/launch.cuh"
#include "kernels/cuda/primitives/query_sums.cuh"

namespace dilated::kernels::cuda {
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
  if (rounded.dtype == Dtype::kFloat32) {
    return round_sums<float>(rounded, sums, stream);
  }
  return with_16_bit(rounded.dtype, [&]<typename Element>() {
    return round_sums<Element>(rounded, sums, stream);
  });
}

}  // namespace dilated::kernels::cuda

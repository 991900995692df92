// delta[b, h, n] = sum_d grad_out * out - grad_lse: what the softmax's backward subtracts from each
// gradient of a row's weights.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/primitives/numerics.cuh"

namespace dilated::kernels::cuda {
namespace {

constexpr int kThreads = 256, kLanes = 8;  // lanes that share a row

struct DeltaCall {
  Rows grad_out, out;
  const float* grad_lse;
  float* delta;
  int64_t heads, queries, rows;
  int32_t head_dim;
};

template <typename Element>
__device__ float dot_16_bytes(const Element* a, const Element* b) {
  const int4 left = __ldcs(reinterpret_cast<const int4*>(a));
  const int4 right = __ldcs(reinterpret_cast<const int4*>(b));
  const Element* x = reinterpret_cast<const Element*>(&left);
  const Element* y = reinterpret_cast<const Element*>(&right);
  float sum = 0;
#pragma unroll
  for (int e = 0; e < static_cast<int>(16 / sizeof(Element)); ++e) {
    sum = fmaf(to_float(x[e]), to_float(y[e]), sum);
  }
  return sum;
}

/// Rows are counted as they lie in memory, [batch, query, head].
template <typename Element>
__global__ void __launch_bounds__(kThreads) delta_kernel(const __grid_constant__ DeltaCall call) {
  constexpr int kChunk = 16 / sizeof(Element);
  const int lane = threadIdx.x % kLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  if (row >= call.rows) {
    return;
  }
  const int64_t position = row / call.heads;
  const int64_t head = row - position * call.heads;
  const int64_t batch = position / call.queries;
  const int64_t query = position - batch * call.queries;
  const auto* grad_out = row_at<Element>(call.grad_out, batch, query, head);
  const auto* out = row_at<Element>(call.out, batch, query, head);
  float sum = 0;
  if (call.grad_out.is_aligned && call.out.is_aligned) {
    for (int d = lane * kChunk; d < call.head_dim; d += kLanes * kChunk) {
      sum += dot_16_bytes(grad_out + d, out + d);
    }
  } else {
    for (int d = lane; d < call.head_dim; d += kLanes) {
      sum = fmaf(to_float(grad_out[d]), to_float(out[d]), sum);
    }
  }
  // The lanes of this row alone: lanes of rows past the end have returned.
  const uint32_t lanes = ((1u << kLanes) - 1) << (threadIdx.x % 32 / kLanes * kLanes);
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(lanes, sum, distance, kLanes);
  }
  if (lane == 0) {
    const int64_t at = (batch * call.heads + head) * call.queries + query;
    call.delta[at] = call.grad_lse == nullptr ? sum : sum - call.grad_lse[at];
  }
}

}  // namespace

cudaError_t attention_delta(const BackwardArgs& args, const Rows& out, const float* grad_lse,
                            float* delta, cudaStream_t stream) {
  const int64_t rows = args.batch * args.queries * args.heads;
  const int64_t blocks = (rows + kThreads / kLanes - 1) / (kThreads / kLanes);
  if (rows == 0) {
    return cudaSuccess;
  }
  if (blocks > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidValue;
  }
  const DeltaCall call{args.grad_out, out,          grad_lse, delta,
                       args.heads,    args.queries, rows,     static_cast<int32_t>(args.head_dim)};
  switch (args.dtype) {
    case Dtype::kFloat16:
      delta_kernel<__half><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(call);
      break;
    case Dtype::kBFloat16:
      delta_kernel<__nv_bfloat16><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(call);
      break;
    case Dtype::kFloat32:
      delta_kernel<float><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(call);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace dilated::kernels::cuda

// Launches the backward pass in float32 arithmetic: a kernel for the keys' gradients, one for the
// queries'.
#include "kernels/cuda/primitives/launch.cuh"
#include "kernels/cuda/scalar/attention.h"
#include "kernels/cuda/scalar/attention_backward.cuh"

namespace dilated::kernels::cuda::scalar {
namespace {

template <typename Element, int kWidth>
cudaError_t launch(const BackwardChoice& choice, const BackwardArgs& args, cudaStream_t stream) {
  using Shape = ScalarShape<kWidth>;
  static_assert(sizeof(ScalarMemory<kWidth>) == Shape::kTile.bytes() &&
                Shape::kTile.bytes() <= kLeastSharedBytes);
  const cudaError_t error = launch_kernel<backward_scalar_kernel<Element, kWidth, true>>(
      args, count_blocks(args.keys, args.kv_heads, args.batch, choice.row_tile), Shape::kThreads,
      choice.shared_bytes, stream);
  return error != cudaSuccess
             ? error
             : launch_kernel<backward_scalar_kernel<Element, kWidth, false>>(
                   args, count_blocks(args.queries, args.heads, args.batch, choice.row_tile),
                   Shape::kThreads, choice.shared_bytes, stream);
}

cudaError_t launch_float(const BackwardChoice& choice, const BackwardArgs& args,
                         cudaStream_t stream) {
  switch (choice.width) {
    case 32:
      return launch<float, 32>(choice, args, stream);
    case 64:
      return launch<float, 64>(choice, args, stream);
    case 128:
      return launch<float, 128>(choice, args, stream);
    case 256:
      return launch<float, 256>(choice, args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

/// Only the widest tiles of the portable family are ever too large.
template <typename Element>
cudaError_t launch_half(const BackwardChoice& choice, const BackwardArgs& args,
                        cudaStream_t stream) {
  return choice.width == 256 ? launch<Element, 256>(choice, args, stream) : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t attention_backward(const BackwardChoice& choice, const BackwardArgs& args,
                               cudaStream_t stream) {
  if (args.dtype == Dtype::kFloat32) {
    return launch_float(choice, args, stream);
  }
  return with_16_bit(
      args.dtype, [&]<typename Element>() { return launch_half<Element>(choice, args, stream); });
}

}  // namespace dilated::kernels::cuda::scalar

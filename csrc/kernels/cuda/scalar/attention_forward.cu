// Launches the forward pass in float32.
#include "kernels/cuda/primitives/launch.cuh"
#include "kernels/cuda/scalar/attention.h"
#include "kernels/cuda/scalar/attention_forward.cuh"

namespace dilated::kernels::cuda::scalar {
namespace {

template <int kWidth>
cudaError_t launch(const ForwardChoice& choice, const ForwardArgs& args, cudaStream_t stream) {
  using Shape = FloatShape<kWidth>;
  static_assert(sizeof(FloatMemory<Shape>) == Shape::kTile.bytes() &&
                Shape::kTile.bytes() <= kLeastSharedBytes);
  return launch_kernel<attention_forward_float_kernel<kWidth>>(
      prepare_forward(args), count_blocks(args.queries, args.heads, args.batch, choice.row_tile),
      Shape::kThreads, choice.shared_bytes, stream);
}

}  // namespace

cudaError_t attention_forward(const ForwardChoice& choice, const ForwardArgs& args,
                              cudaStream_t stream) {
  switch (choice.width) {
    case 64:
      return launch<64>(choice, args, stream);
    case 128:
      return launch<128>(choice, args, stream);
    case 256:
      return launch<256>(choice, args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace dilated::kernels::cuda::scalar

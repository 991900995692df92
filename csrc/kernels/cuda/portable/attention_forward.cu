// Launches the forward pass for 16-bit elements.
#include "kernels/cuda/portable/attention.h"
#include "kernels/cuda/portable/attention_forward.cuh"
#include "kernels/cuda/primitives/launch.cuh"

namespace dilated::kernels::cuda::portable {
namespace {

template <typename Element, int kWidth, int kWarps, int kWarpTiles>
cudaError_t launch(const ForwardChoice& choice, const ForwardArgs& args, cudaStream_t stream) {
  using Shape = ForwardShape<kWidth, kWarps, kWarpTiles>;
  static_assert(sizeof(ForwardMemory<Shape>) == Shape::kTile.bytes() &&
                Shape::kTile.bytes() <= kLeastSharedBytes);
  const ForwardCall call = prepare_forward(args);
  const int64_t blocks = count_blocks(args.queries, args.heads, args.batch, choice.row_tile);
  return args.is_partial || args.running_lse != nullptr || args.far_key.data != nullptr
             ? launch_kernel<attention_forward_kernel<Element, Shape, true>>(
                   call, blocks, Shape::kThreads, choice.shared_bytes, stream)
             : launch_kernel<attention_forward_kernel<Element, Shape, false>>(
                   call, blocks, Shape::kThreads, choice.shared_bytes, stream);
}

template <typename Element>
cudaError_t launch_short(const ForwardChoice& choice, const ForwardArgs& args,
                         cudaStream_t stream) {
  switch (choice.width) {
    case 32:
      return launch<Element, 32, 1, 1>(choice, args, stream);
    case 64:
      return launch<Element, 64, 1, 1>(choice, args, stream);
    case 128:
      return launch<Element, 128, 1, 1>(choice, args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename Element>
cudaError_t launch_width(const ForwardChoice& choice, const ForwardArgs& args,
                         cudaStream_t stream) {
  switch (choice.width) {
    case 32:
      return launch<Element, 32, 4, 1>(choice, args, stream);
    case 48:
      return launch<Element, 48, 4, 1>(choice, args, stream);
    case 64:
      return choice.tile.rows == 64 ? launch<Element, 64, 4, 1>(choice, args, stream)
                                    : launch<Element, 64, 8, 1>(choice, args, stream);
    case 96:
      return launch<Element, 96, 4, 2>(choice, args, stream);
    case 128:
      return launch<Element, 128, 4, 2>(choice, args, stream);
    case 192:
      return launch<Element, 192, 4, 1>(choice, args, stream);
    case 256:
      return launch<Element, 256, 4, 1>(choice, args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t attention_forward(const ForwardChoice& choice, const ForwardArgs& args,
                              cudaStream_t stream) {
  return with_16_bit(args.dtype, [&]<typename Element>() {
    return choice.tile.rows == kShortRowTile ? launch_short<Element>(choice, args, stream)
                                             : launch_width<Element>(choice, args, stream);
  });
}

}  // namespace dilated::kernels::cuda::portable

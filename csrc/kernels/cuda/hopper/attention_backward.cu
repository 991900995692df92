// Launches the backward pass on Hopper.
#include "kernels/cuda/hopper/attention.h"
#include "kernels/cuda/hopper/attention_backward.cuh"
#include "kernels/cuda/hopper/tensor_maps.h"
#include "kernels/cuda/primitives/launch.cuh"

namespace dilated::kernels::cuda::hopper {
namespace {

template <typename Element, int kWidth>
cudaError_t launch(const BackwardChoice& choice, const BackwardArgs& args,
                   const BackwardWorkspace& workspace, cudaStream_t stream) {
  using Shape = BackwardShape<kWidth>;
  static_assert(sizeof(BackwardMemory<Shape>) + 1024 == Shape::kTile.bytes());
  BackwardCall call;
  call.args = args;
  call.counter = workspace.counter;
  call.sums = {workspace.query_sums, choice.sums_width};
  call.heads_per_key_head = static_cast<int32_t>(args.heads / args.kv_heads);
  call.scale_log2 = args.scale * kLog2E;
  call.strides = choice.strides;
  cudaError_t error = encode_maps({args, args.query, args.queries, args.heads}, call.strides,
                                  Shape::kColumns, call.query);
  if (error == cudaSuccess) {
    error = encode_maps({args, args.grad_out, args.queries, args.heads}, call.strides,
                        Shape::kColumns, call.grad_out);
  }
  if (error == cudaSuccess) {
    error = encode_sum_maps(
        {workspace.query_sums, choice.sums_width, args.queries, args.heads * args.batch},
        call.strides, Shape::kBoxColumns, call.sum_maps);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const int64_t tiles = count_blocks(args.keys, args.kv_heads, args.batch, choice.row_tile);
  return launch_kernel<attention_backward_kernel<Element, Shape>>(
      call, std::min<int64_t>(tiles, choice.max_blocks), Shape::kThreads, choice.shared_bytes,
      stream);
}

template <typename Element>
cudaError_t launch_width(const BackwardChoice& choice, const BackwardArgs& args,
                         const BackwardWorkspace& workspace, cudaStream_t stream) {
  switch (choice.width) {
    case 32:
      return launch<Element, 32>(choice, args, workspace, stream);
    case 48:
      return launch<Element, 48>(choice, args, workspace, stream);
    case 64:
      return launch<Element, 64>(choice, args, workspace, stream);
    case 96:
      return launch<Element, 96>(choice, args, workspace, stream);
    case 128:
      return launch<Element, 128>(choice, args, workspace, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t attention_backward(const BackwardChoice& choice, const BackwardArgs& args,
                               const BackwardWorkspace& workspace, cudaStream_t stream) {
  return with_16_bit(args.dtype, [&]<typename Element>() {
    return launch_width<Element>(choice, args, workspace, stream);
  });
}

}  // namespace dilated::kernels::cuda::hopper

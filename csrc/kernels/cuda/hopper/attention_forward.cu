// Launches the forward pass on Hopper.
#include "kernels/cuda/hopper/attention.h"
#include "kernels/cuda/hopper/attention_forward.cuh"
#include "kernels/cuda/hopper/tensor_maps.h"
#include "kernels/cuda/primitives/launch.cuh"

namespace dilated::kernels::cuda::hopper {
namespace {

template <typename Element, int kWidth>
cudaError_t launch(const ForwardChoice& choice, const ForwardArgs& args,
                   unsigned long long* counter, cudaStream_t stream) {
  using Shape = ForwardShape<kWidth>;
  static_assert(sizeof(ForwardMemory<Shape>) + 1024 == Shape::kTile.bytes());
  HopperCall call;
  call.call = prepare_forward(args);
  call.counter = choice.has_counter ? counter : nullptr;
  call.strides = choice.strides;
  const auto encode = [&](const Rows& near, const Rows& far, RowMaps& maps) {
    const cudaError_t error =
        encode_maps({args, near, args.keys, args.kv_heads}, call.strides, Shape::kColumns, maps);
    return error != cudaSuccess || far.data == nullptr
               ? error
               : encode_far_maps({args, far, args.far_keys, args.kv_heads}, args.keys, call.strides,
                                 Shape::kColumns, maps);
  };
  cudaError_t error = encode(args.key, args.far_key, call.key);
  if (error == cudaSuccess) {
    error = encode(args.value, args.far_value, call.value);
  }
  if (error != cudaSuccess) {
    return error;
  }
  const int64_t tiles = count_blocks(args.queries, args.heads, args.batch, choice.row_tile);
  return launch_kernel<attention_forward_kernel<Element, Shape>>(
      call, std::min<int64_t>(tiles, choice.max_blocks), Shape::kThreads, choice.shared_bytes,
      stream);
}

template <typename Element>
cudaError_t launch_width(const ForwardChoice& choice, const ForwardArgs& args,
                         unsigned long long* counter, cudaStream_t stream) {
  switch (choice.width) {
    case 32:
      return launch<Element, 32>(choice, args, counter, stream);
    case 48:
      return launch<Element, 48>(choice, args, counter, stream);
    case 64:
      return launch<Element, 64>(choice, args, counter, stream);
    case 96:
      return launch<Element, 96>(choice, args, counter, stream);
    case 128:
      return launch<Element, 128>(choice, args, counter, stream);
    case 192:
      return launch<Element, 192>(choice, args, counter, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

bool is_available() { return can_encode(); }

cudaError_t attention_forward(const ForwardChoice& choice, const ForwardArgs& args,
                              unsigned long long* counter, cudaStream_t stream) {
  return with_16_bit(args.dtype, [&]<typename Element>() {
    return launch_width<Element>(choice, args, counter, stream);
  });
}

}  // namespace dilated::kernels::cuda::hopper

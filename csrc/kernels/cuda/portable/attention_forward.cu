// Launches the forward pass: from run-time dtype and head_dim to a kernel.
#include <cstdint>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/portable/attention_forward.cuh"
#include "kernels/cuda/portable/attention_forward_float.cuh"
#include "kernels/cuda/primitives/launch.cuh"

namespace dilated::kernels::cuda {
namespace {

template <typename Element, int kHeadDim, int kWarps, int kWarpTiles>
cudaError_t launch_tensor_cores(const ForwardCall& call, cudaStream_t stream) {
  using Shape = ForwardShape<kHeadDim, kWarps, kWarpTiles>;
  static_assert(sizeof(ForwardMemory<Shape>) <= kSharedBytes);
  const ForwardArgs& args = call.args;
  const int64_t blocks = count_blocks(args.queries, args.heads, args.batch);
  constexpr size_t kBytes = sizeof(ForwardMemory<Shape>);
  return args.is_partial || args.running_lse != nullptr
             ? launch_kernel<attention_forward_kernel<Element, Shape, true>>(
                   call, blocks, Shape::kThreads, kBytes, stream)
             : launch_kernel<attention_forward_kernel<Element, Shape, false>>(
                   call, blocks, Shape::kThreads, kBytes, stream);
}

template <int kHeadDim>
cudaError_t launch_float(const ForwardCall& call, cudaStream_t stream) {
  using Shape = FloatShape<kHeadDim>;
  static_assert(sizeof(FloatMemory<Shape>) <= kSharedBytes);
  const ForwardArgs& args = call.args;
  return launch_kernel<attention_forward_float_kernel<kHeadDim>>(
      call, count_blocks(args.queries, args.heads, args.batch), Shape::kThreads,
      sizeof(FloatMemory<Shape>), stream);
}

/// The width that holds head_dim, with the block that measured best on it. 128 rows halve what is
/// read from L2; a causal tile of 64 wastes less above the diagonal.
template <typename Element>
cudaError_t choose_head_dim(const ForwardCall& call, cudaStream_t stream) {
  switch ((call.args.head_dim + 15) / 16) {
    case 1:
    case 2:
      return launch_tensor_cores<Element, 32, 4, 1>(call, stream);
    case 3:
      return launch_tensor_cores<Element, 48, 4, 1>(call, stream);
    case 4:
      return call.args.is_causal ? launch_tensor_cores<Element, 64, 4, 1>(call, stream)
                                 : launch_tensor_cores<Element, 64, 8, 1>(call, stream);
    case 5:
    case 6:
      return launch_tensor_cores<Element, 96, 4, 2>(call, stream);
    case 7:
    case 8:
      return launch_tensor_cores<Element, 128, 4, 2>(call, stream);
    case 9:
    case 10:
    case 11:
    case 12:
      return launch_tensor_cores<Element, 192, 4, 1>(call, stream);
    case 13:
    case 14:
    case 15:
    case 16:
      return launch_tensor_cores<Element, 256, 4, 1>(call, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t choose_float_head_dim(const ForwardCall& call, cudaStream_t stream) {
  switch ((call.args.head_dim + 63) / 64) {
    case 1:
      return launch_float<64>(call, stream);
    case 2:
      return launch_float<128>(call, stream);
    default:
      return launch_float<256>(call, stream);
  }
}

ForwardCall prepare(const ForwardArgs& args) {
  const int64_t dtype_bytes = args.dtype == Dtype::kFloat32 ? 4 : 2;
  const auto aligned = [&](const Rows& rows) {
    return is_aligned(rows, args.head_dim, dtype_bytes);
  };
  return {args,
          static_cast<int32_t>(args.heads / args.kv_heads),
          args.scale * kLog2E,
          aligned(args.query),
          aligned(args.key),
          aligned(args.value),
          is_aligned(args.out, args.head_dim, args.is_partial ? 4 : dtype_bytes),
          is_aligned(args.running_out, args.head_dim, 4)};
}

}  // namespace

cudaError_t attention_forward(const ForwardArgs& args, cudaStream_t stream) {
  if (args.queries == 0 || args.batch == 0 || args.heads == 0) {
    return cudaSuccess;
  }
  const ForwardCall call = prepare(args);
  switch (args.dtype) {
    case Dtype::kFloat16:
      return choose_head_dim<__half>(call, stream);
    case Dtype::kBFloat16:
      return choose_head_dim<__nv_bfloat16>(call, stream);
    case Dtype::kFloat32:
      return choose_float_head_dim(call, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace dilated::kernels::cuda

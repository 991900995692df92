#include "kernels/cuda/decode/attend.cuh"
#include "kernels/cuda/decode/decode.h"
#include "kernels/cuda/decode/scalar_rows.cuh"
#include "kernels/cuda/decode/tensor_core_rows.cuh"
#include "kernels/cuda/primitives/launch.cuh"

namespace dilated::kernels::cuda::decode {
namespace {

template <typename Element, typename Rows>
cudaError_t launch(const AttendCall& call, int64_t blocks, cudaStream_t stream) {
  const bool overlaps = call.choice.overlaps;
  attend_kernel<Element, Rows>
      <<<static_cast<unsigned>(blocks), 32 * Rows::kWarps, 0, stream>>>(call);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    return error;
  }
  if (call.choice.splits > 1) {
    const int64_t queries = call.args.batch * call.args.queries * call.args.heads;
    return launch_next(combine_kernel<Element>, call, queries, kCombineThreads, overlaps, stream);
  }
  if (call.args.appends()) {
    constexpr int kThreads = 128;
    const int64_t advancing = (call.args.batch + kThreads - 1) / kThreads;
    return launch_next(advance_kernel, call, advancing, kThreads, overlaps, stream);
  }
  return cudaSuccess;
}

template <typename Element, template <typename, int> class Rows>
cudaError_t launch_width(const AttendCall& call, int64_t blocks, cudaStream_t stream) {
  switch (call.choice.width) {
    case 64:
      return launch<Element, Rows<Element, 64>>(call, blocks, stream);
    case 128:
      return launch<Element, Rows<Element, 128>>(call, blocks, stream);
    case 192:
      return launch<Element, Rows<Element, 192>>(call, blocks, stream);
    case 256:
      return launch<Element, Rows<Element, 256>>(call, blocks, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename Element>
cudaError_t launch_16_bit(const AttendCall& call, int64_t blocks, cudaStream_t stream) {
  return call.choice.family == Family::kTensorCores
             ? launch_width<Element, TensorCoreRows>(call, blocks, stream)
             : launch_width<Element, ScalarRows>(call, blocks, stream);
}

}  // namespace

int64_t workspace_size(const DecodeAttendArgs& args, const Choice& choice) {
  const int64_t queries = args.batch * args.queries * args.heads;
  return choice.splits > 1 ? queries * choice.splits * (args.head_dim + 1) : 0;
}

cudaError_t step(const DecodeStepArgs& args, const Choice& choice, float* workspace,
                 cudaStream_t stream) {
  const int64_t queries = args.batch * args.queries;
  const int64_t parts = (args.heads / args.kv_heads + choice.heads - 1) / choice.heads;
  const int64_t blocks = queries * args.kv_heads * parts * choice.splits;
  if (blocks == 0) {
    return cudaSuccess;
  }
  if (std::max(blocks, queries * args.heads) > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidValue;
  }
  float* lse = workspace + queries * args.heads * choice.splits * args.head_dim;
  const AttendCall call{args, choice, workspace, lse};
  switch (args.dtype) {
    case Dtype::kFloat16:
      return launch_16_bit<__half>(call, blocks, stream);
    case Dtype::kBFloat16:
      return launch_16_bit<__nv_bfloat16>(call, blocks, stream);
    case Dtype::kFloat32:
      return launch_width<float, ScalarRows>(call, blocks, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace dilated::kernels::cuda::decode

#include "kernels/cuda/hopper/tensor_maps.h"

#include <algorithm>

namespace dilated::kernels::cuda::hopper {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

/// The driver's, which the CUDA runtime has loaded: nothing links the driver itself.
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  constexpr unsigned kVersion = 12000;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             kVersion, cudaEnableDefault, &result);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess
             ? reinterpret_cast<Encode>(found)
             : nullptr;
}

Encode encoder() {
  static const Encode found = find_encode();
  return found;
}

}  // namespace

bool can_encode() { return encoder() != nullptr; }

cudaError_t encode(const MapOf& of, CUtensorMap& map) {
  const AttentionArgs& args = of.args;
  const auto bytes = [](int64_t elements) { return static_cast<cuuint64_t>(elements) * 2; };
  const auto dimension = [](int64_t size) { return static_cast<cuuint64_t>(size); };
  const Strides& strides = of.rows.strides;
  const cuuint64_t step = bytes(strides.row) * static_cast<cuuint64_t>(of.stride);
  const cuuint64_t sizes[] = {dimension(args.head_dim), dimension(of.box_rows),
                              dimension(args.keys), dimension(args.kv_heads),
                              dimension(args.batch)};
  // The driver refuses 0, which a dimension of one entry may have.
  const auto spacing = [](cuuint64_t stride) { return std::max<cuuint64_t>(stride, 16); };
  const cuuint64_t spacings[] = {spacing(step), spacing(bytes(strides.row)),
                                 spacing(bytes(strides.head)), spacing(bytes(strides.batch))};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(of.box_rows), 1, 1, 1};
  const cuuint32_t every[] = {1, 1, 1, 1, 1};
  const CUtensorMapDataType type = args.dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encoder()(&map, type, 5, const_cast<void*>(of.rows.data), sizes, spacings, box, every,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace dilated::kernels::cuda::hopper

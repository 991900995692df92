#include "kernels/cuda/hopper/tensor_maps.h"

#include "kernels/cuda/hopper/shapes.h"

namespace dilated::kernels::cuda::hopper {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

cudaError_t find_function(const char* name, void** found, cudaDriverEntryPointQueryResult* result) {
#if CUDART_VERSION >= 12050
  constexpr unsigned kVersion = 12000;
  return cudaGetDriverEntryPointByVersion(name, found, kVersion, cudaEnableDefault, result);
#else
  return cudaGetDriverEntryPoint(name, found, cudaEnableDefault, result);
#endif
}

/// The driver's, which the CUDA runtime has loaded: nothing links the driver itself. Nothing of a
/// driver that can't launch kernels with the maps among their parameters, of more than 4 KiB.
Encode find_encode() {
  constexpr int kLargeParameters = 12010;
  int version = 0;
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const bool has = cudaDriverGetVersion(&version) == cudaSuccess && version >= kLargeParameters &&
                   find_function("cuTensorMapEncodeTiled", &found, &result) == cudaSuccess &&
                   result == cudaDriverEntryPointSuccess;
  if (!has) {
    static_cast<void>(cudaGetLastError());  // which the next launch would report
  }
  return has ? reinterpret_cast<Encode>(found) : nullptr;
}

Encode encoder() {
  static const Encode found = find_encode();
  return found;
}

/// Boxes of `box_rows` rows at `stride`.
cudaError_t encode(const MappedRows& of, int32_t stride, int32_t box_rows, CUtensorMap& map) {
  const AttentionArgs& args = of.args;
  const auto bytes = [](int64_t elements) { return static_cast<cuuint64_t>(elements) * 2; };
  const auto dimension = [](int64_t size) { return static_cast<cuuint64_t>(size); };
  const Strides& strides = of.rows.strides;
  const cuuint64_t sizes[] = {dimension(args.head_dim), dimension(box_rows), dimension(of.entries),
                              dimension(of.heads), dimension(args.batch)};
  // The driver looks at the stride of a dimension of one entry, too, where it may be anything.
  constexpr cuuint64_t kAny = 16;
  const auto spacing = [&](int64_t entries, int64_t stride) {
    return entries <= 1 ? kAny : bytes(stride);
  };
  const cuuint64_t spacings[] = {spacing(of.entries, strides.row * stride),
                                 spacing(of.entries, strides.row), spacing(of.heads, strides.head),
                                 spacing(args.batch, strides.batch)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows), 1, 1, 1};
  const cuuint32_t every[] = {1, 1, 1, 1, 1};
  const CUtensorMapDataType type = args.dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encoder()(&map, type, 5, const_cast<void*>(of.rows.data), sizes, spacings, box, every,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

/// The maps from number `first` on.
cudaError_t encode_maps_at(int32_t first, const MappedRows& rows, const ListStrides& strides,
                           int32_t tile_rows, RowMaps& maps) {
  if (rows.entries == 0) {
    return cudaSuccess;  // and nothing to copy
  }
  for (int32_t i = 0; i < strides.count; ++i) {
    cudaError_t error = encode(rows, strides.stride[i], tile_rows, maps.whole[first + i]);
    if (error == cudaSuccess) {
      error = encode(rows, strides.stride[i], kSlotRows, maps.slot[first + i]);
    }
    if (error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace

bool can_encode() { return encoder() != nullptr; }

cudaError_t encode_maps(const MappedRows& rows, const ListStrides& strides, int32_t tile_rows,
                        RowMaps& maps) {
  return encode_maps_at(0, rows, strides, tile_rows, maps);
}

cudaError_t encode_far_maps(const MappedRows& rows, int64_t near_rows, const ListStrides& strides,
                            int32_t tile_rows, RowMaps& maps) {
  maps.near_rows = static_cast<int32_t>(near_rows);
  maps.near_maps = strides.count;
  return encode_maps_at(strides.count, rows, strides, tile_rows, maps);
}

}  // namespace dilated::kernels::cuda::hopper

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

cuuint64_t unsigned_of(int64_t size) { return static_cast<cuuint64_t>(size); }

/// What the driver is told of a map: spacings are in bytes, between entries of all dimensions but
/// the first.
struct Layout {
  CUtensorMapDataType type;
  void* data;
  cuuint64_t sizes[5], spacings[4];
  cuuint32_t box[5];
  CUtensorMapSwizzle swizzle;
};

cudaError_t encode(const Layout& layout, CUtensorMap& map) {
  const cuuint32_t every[] = {1, 1, 1, 1, 1};
  const CUresult result =
      encoder()(&map, layout.type, 5, layout.data, layout.sizes, layout.spacings, layout.box, every,
                CU_TENSOR_MAP_INTERLEAVE_NONE, layout.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

/// Boxes of `box_rows` rows at `stride`.
cudaError_t encode(const MappedRows& of, int32_t stride, int32_t box_rows, CUtensorMap& map) {
  const AttentionArgs& args = of.args;
  const Strides& strides = of.rows.strides;
  // The driver looks at the stride of a dimension of one entry, too, where it may be anything.
  constexpr cuuint64_t kAny = 16;
  const auto spacing = [&](int64_t entries, int64_t stride) {
    return entries <= 1 ? kAny : unsigned_of(stride) * 2;
  };
  return encode(
      {.type = args.dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                             : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
       .data = const_cast<void*>(of.rows.data),
       .sizes = {unsigned_of(args.head_dim), unsigned_of(box_rows), unsigned_of(of.entries),
                 unsigned_of(of.heads), unsigned_of(args.batch)},
       .spacings = {spacing(of.entries, strides.row * stride), spacing(of.entries, strides.row),
                    spacing(of.heads, strides.head), spacing(args.batch, strides.batch)},
       .box = {64, static_cast<cuuint32_t>(box_rows), 1, 1, 1},
       .swizzle = CU_TENSOR_MAP_SWIZZLE_128B},
      map);
}

/// Boxes of a slot's rows at `stride`.
cudaError_t encode(const MappedSums& of, int32_t stride, int32_t columns, CUtensorMap& map) {
  const cuuint64_t row = unsigned_of(of.width) * sizeof(float);
  const auto blocks = [](int64_t columns) { return unsigned_of(columns / kBlockColumns); };
  return encode({.type = CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                 .data = of.data,
                 .sizes = {kBlockColumns, kSlotRows, blocks(of.width), unsigned_of(of.entries),
                           unsigned_of(of.heads)},
                 .spacings = {row * unsigned_of(stride), kBlockColumns * sizeof(float), row,
                              row * unsigned_of(of.entries)},
                 .box = {kBlockColumns, kSlotRows, static_cast<cuuint32_t>(blocks(columns)), 1, 1},
                 .swizzle = CU_TENSOR_MAP_SWIZZLE_NONE},
                map);
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

cudaError_t encode_sum_maps(const MappedSums& sums, const ListStrides& strides, int32_t columns,
                            SumMaps& maps) {
  cudaError_t error = cudaSuccess;
  for (int32_t i = 0; sums.entries > 0 && i < strides.count && error == cudaSuccess; ++i) {
    error = encode(sums, strides.stride[i], columns, maps.slot[i]);
  }
  return error;
}

}  // namespace dilated::kernels::cuda::hopper

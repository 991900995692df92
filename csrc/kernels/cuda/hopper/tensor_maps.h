// Tensor maps of keys and values, which the host encodes for each call.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/attention.h"

namespace dilated::kernels::cuda::hopper {

/// Whether the driver has what encodes them.
bool can_encode();

/// Of 16-bit rows at `stride`: boxes of `box_rows` rows and 64 columns, swizzled. See KeyMaps.
struct MapOf {
  const AttentionArgs& args;
  const Rows& rows;
  int32_t stride, box_rows;
};
cudaError_t encode(const MapOf& of, CUtensorMap& map);

}  // namespace dilated::kernels::cuda::hopper

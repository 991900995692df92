// What the forward kernels, 16-bit and float32, are launched with.
#pragma once

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/primitives/launch.cuh"
#include "kernels/cuda/primitives/lists.cuh"
#include "kernels/cuda/primitives/row_tile.cuh"

namespace dilated::kernels::cuda {

struct ForwardCall {
  ForwardArgs args;
  int32_t heads_per_key_head;
  float scale_log2;  // scale * log2(e), for exponentials of scores that are not rounded as logits
  // See RowSource::is_aligned.
  bool query_aligned, key_aligned, value_aligned, out_aligned, running_aligned;
};

/// On the host.
inline ForwardCall prepare_forward(const ForwardArgs& args) {
  const int64_t bytes = args.dtype == Dtype::kFloat32 ? 4 : 2;
  const auto aligned = [&](const Rows& rows) { return is_aligned(rows, args.head_dim, bytes); };
  return {args,
          static_cast<int32_t>(args.heads / args.kv_heads),
          args.scale * kLog2E,
          aligned(args.query),
          aligned(args.key),
          aligned(args.value),
          is_aligned(args.out, args.head_dim, args.is_partial ? 4 : bytes),
          is_aligned(args.running_out, args.head_dim, 4)};
}

}  // namespace dilated::kernels::cuda

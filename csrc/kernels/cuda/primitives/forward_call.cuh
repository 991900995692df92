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
};

/// On the host.
inline ForwardCall prepare_forward(const ForwardArgs& args) {
  return {args, static_cast<int32_t>(args.heads / args.kv_heads), args.scale * kLog2E};
}

}  // namespace dilated::kernels::cuda

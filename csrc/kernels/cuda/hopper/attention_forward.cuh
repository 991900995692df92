// Forward pass for 16-bit elements on Hopper (sm_90a): wgmma, TMA.
//
// A block stays and takes one tile of queries after another. One warpgroup brings rows into shared
// memory, two compute; what they hand to one another waits in buffers between barriers, so that
// keys of the next tile arrive while this one ends.
#pragma once

#include "kernels/cuda/hopper/forward_producer.cuh"
#include "kernels/cuda/hopper/forward_result.cuh"

namespace dilated::kernels::cuda::hopper {

template <typename Shape>
__device__ void init_barriers(ForwardMemory<Shape>& memory) {
  init(memory.item_turns, 1, kItemReaders);
  init(memory.query_turns, 1, kComputingWarps);
  init(memory.key_turns, 1, kComputingWarps);
  init(memory.value_turns, 1, kComputingWarps);
}

template <typename Element, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attention_forward_kernel(const __grid_constant__ HopperCall hopper) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  run_block<ForwardMemory<Shape>>(
      [&](ForwardMemory<Shape>& memory) {
        produce(hopper, PatternView{hopper.call.args.pattern}.forward(), memory);
      },
      [&](ForwardMemory<Shape>& memory) {
        ForwardWarpgroup<Element, Shape>(hopper.call, memory).run();
      });
#endif
}

}  // namespace dilated::kernels::cuda::hopper

// Backward pass for 16-bit elements on Hopper (sm_90a): wgmma, TMA.
//
// Blocks stay and take one tile of keys after another, as in the forward pass. Gradients of keys
// and values stay in registers; that of queries is added up in memory.
#pragma once

#include "kernels/cuda/hopper/backward_producer.cuh"
#include "kernels/cuda/hopper/backward_warpgroup.cuh"

namespace dilated::kernels::cuda::hopper {

template <typename Shape>
__device__ void init_barriers(BackwardMemory<Shape>& memory) {
  init(memory.item_turns, 1, kItemReaders);
  init(memory.row_turns, 1, kComputingWarps);
  init(memory.query_turns, 2, kComputingWarps);
  init(memory.grad_out_turns, 2, kComputingWarps);
}

template <typename Element, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attention_backward_kernel(const __grid_constant__ BackwardCall call) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  run_block<BackwardMemory<Shape>>(
      [&](BackwardMemory<Shape>& memory) {
        produce(call, PatternView{call.args.pattern}.transposed(), memory);
      },
      [&](BackwardMemory<Shape>& memory) {
        BackwardWarpgroup<Element, Shape>(call, memory).run();
      });
#endif
}

}  // namespace dilated::kernels::cuda::hopper

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
  constexpr int kWarps = 4 * Shape::kGroups;  // which compute
  constexpr int kCopyingWarps = 3;            // which read items
  const auto init = [](Handover& handover, int full, int empty) {
    handover.full.init(full);
    handover.empty.init(empty);
  };
  for (Handover& turn : memory.item_turns) {
    init(turn, 1, kWarps + kCopyingWarps);
  }
  for (Handover& turn : memory.row_turns) {
    init(turn, 1, kWarps);
  }
  for (Handover& turn : memory.query_turns) {
    init(turn, 2, kWarps);
  }
  for (Handover& turn : memory.grad_out_turns) {
    init(turn, 2, kWarps);
  }
  publish_barriers();
}

template <typename Element, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attention_backward_kernel(const __grid_constant__ BackwardCall call) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char bytes[];
  const uint32_t start = shared_address(bytes);
  auto& memory = *reinterpret_cast<BackwardMemory<Shape>*>(bytes + (1024 - start % 1024) % 1024);
  if (threadIdx.x == 0) {
    init_barriers(memory);
  }
  __syncthreads();
  constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  if (threadIdx.x < 128) {
    give_registers<kProducerRegisters>();
    produce(call, PatternView{call.args.pattern}.transposed(), memory);
  } else {
    take_registers<kConsumerRegisters>();
    BackwardWarpgroup<Element, Shape>(call, memory).run();
  }
#endif
}

}  // namespace dilated::kernels::cuda::hopper

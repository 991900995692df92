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
  constexpr int kWarps = 4 * Shape::kGroups;  // which compute
  constexpr int kCopyingWarps = 3;            // which read items
  const auto init = [](Handover& handover, int full, int empty) {
    handover.full.init(full);
    handover.empty.init(empty);
  };
  for (Handover& turn : memory.item_turns) {
    init(turn, 1, kWarps + kCopyingWarps);
  }
  for (Handover& turn : memory.query_turns) {
    init(turn, 1, kWarps);
  }
  for (Handover& turn : memory.key_turns) {
    init(turn, 1, kWarps);
  }
  for (Handover& turn : memory.value_turns) {
    init(turn, 1, kWarps);
  }
  publish_barriers();
}

template <typename Element, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attention_forward_kernel(const __grid_constant__ HopperCall hopper) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char bytes[];
  const uint32_t start = shared_address(bytes);
  auto& memory = *reinterpret_cast<ForwardMemory<Shape>*>(bytes + (1024 - start % 1024) % 1024);
  if (threadIdx.x == 0) {
    init_barriers(memory);
  }
  __syncthreads();
  constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  if (threadIdx.x < 128) {
    give_registers<kProducerRegisters>();
    const TableView table = PatternView{hopper.call.args.pattern}.forward();
    produce(hopper, table, memory);
  } else {
    take_registers<kConsumerRegisters>();
    ForwardWarpgroup<Element, Shape>(hopper.call, memory).run();
  }
#endif
}

}  // namespace dilated::kernels::cuda::hopper

// Barriers in shared memory (mbarrier) and the copies that complete them: tiles from tensor maps
// (TMA). And what else is Hopper's alone: registers that move between warps, proxies.
//
// A barrier runs through phases; a phase ends when all its arrivals have come and the bytes that
// were announced have been written. A waiter names the parity of the phase: of a buffer's n-th use,
// n % 2 where the buffer is filled and the opposite where it is emptied, which first returns at
// once.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace dilated::kernels::cuda::hopper {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// A hint: how long a waiter may sleep before it looks again.
inline constexpr int kSleepNanoseconds = 1000000;

struct alignas(8) Barrier {
  uint64_t state;

  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)),
                 "r"(arrivals)
                 : "memory");
  }
  /// After what this thread wrote or read.
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  /// And announces what copies will write.
  __device__ void arrive_expecting(int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
        "r"(bytes)
        : "memory");
  }
  __device__ void wait(uint32_t parity) {
    uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{\n.reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, %3;\n"
          "selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(shared_address(this)), "r"(parity), "n"(kSleepNanoseconds)
          : "memory");
    }
  }
};

/// After init(), so that copies find the barriers; before the block's __syncthreads.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// A barrier of some warps, by number: `threads` in all, of which some wait and others only arrive.
/// Those that wait see what the others wrote before.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void arrive_at(int barrier, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/// What this thread wrote to shared memory becomes visible to tensor cores and copy engines.
__device__ inline void publish_to_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Copies a box of the map, from these coordinates on, the innermost first.
__device__ inline void copy_box(uint32_t to, const CUtensorMap* map, Barrier& done, int32_t column,
                                int32_t step, int32_t place, int32_t head, int32_t batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
      "l"(map), "r"(shared_address(&done)), "r"(column), "r"(step), "r"(place), "r"(head),
      "r"(batch)
      : "memory");
}

/// Adds float32 sums in shared memory to those in global memory: a box of the map (see
/// SumMaps), or numbers side by side, `bytes` a multiple of 16. Each is
/// read when the thread's wait_for_sum_reads() returns.
__device__ inline void add_box(const CUtensorMap* map, uint32_t from, int32_t block, int32_t place,
                               int32_t head) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group "
      "[%0, {0, 0, %2, %3, %4}], [%1];\n"
      "cp.async.bulk.commit_group;" ::"l"(map),
      "r"(from), "r"(block), "r"(place), "r"(head)
      : "memory");
}
__device__ inline void add_bulk(float* to, uint32_t from, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;" ::"l"(to),
      "r"(from), "r"(bytes)
      : "memory");
}
__device__ inline void wait_for_sum_reads() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

/// By all warps of a warpgroup: registers of each thread from here on.
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace dilated::kernels::cuda::hopper

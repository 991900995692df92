// Copies from global to shared memory that run while the thread goes on (cp.async, sm_80 and
// later).
//
// A thread's copies form groups: commit_copies() closes the current one, wait_for_copies<n>()
// returns when at most the n youngest groups of this thread are under way. Other threads see the
// bytes after a barrier that follows the wait.
#pragma once

#include <cstdint>

namespace dilated::kernels::cuda {

/// 16 bytes, both addresses aligned to 16, past L1, as every block reads a row once; where not
/// `valid`, 16 zero bytes, and `global` is not read.
__device__ inline void copy_16_async_or_zero(uint32_t shared, const void* global, bool valid) {
  const int32_t bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(bytes)
               : "memory");
}

/// 4 bytes, both addresses aligned to 4.
__device__ inline void copy_4_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kUnderWay>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kUnderWay) : "memory");
}

}  // namespace dilated::kernels::cuda

// Merges a running result with a block's: the softmax over the keys of both.
#pragma once

#include "kernels/cpu/simd.h"

namespace dilated::kernels::cpu::DILATED_ISA {

/// The log-sum-exp of both sets of keys, and what their outputs weigh in the common one.
template <typename T>
struct Merged {
  T lse, running_weight, block_weight;
};

/// -inf stands for no keys and leaves the other side as it is.
template <typename T>
inline Merged<T> merge(T running_lse, T block_lse) {
  if (running_lse == -static_cast<T>(__builtin_inf())) {
    return {block_lse, T{0}, T{1}};
  }
  const T highest = block_lse > running_lse ? block_lse : running_lse;
  const T running = static_cast<T>(__builtin_exp(running_lse - highest));
  const T block = static_cast<T>(__builtin_exp(block_lse - highest));
  const T sum = running + block;
  return {highest + static_cast<T>(__builtin_log(sum)), running / sum, block / sum};
}

}  // namespace dilated::kernels::cpu::DILATED_ISA

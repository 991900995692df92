// Merges a running result with a block's: the softmax over the keys of both.
#pragma once

#include "kernels/cuda/primitives/numerics.cuh"

namespace dilated::kernels::cuda {

/// Adds keys of score 0 and value 0, which padding="zeros" counts, to a row's softmax. What its
/// output, so far against the reference before, is to be multiplied by.
__device__ inline float add_zero_keys(float zero_keys, float& reference, float& sum) {
  float factor = 1;
  if (zero_keys > 0) {
    const float before = reference;
    reference = fmaxf(reference, 0.0f);
    factor = exp_approx(before - reference);
    sum = sum * factor + zero_keys * exp_approx(-reference);
  }
  return factor;
}

/// The log-sum-exp of both sets of keys, and what their outputs weigh in the common one.
struct Merged {
  float lse, running_weight, block_weight;
};

/// -inf stands for no keys and leaves the other side as it is.
__device__ inline Merged merge(float running_lse, float block_lse) {
  if (running_lse == negative_infinity()) {
    return {block_lse, 0, 1};
  }
  const float highest = block_lse > running_lse ? block_lse : running_lse;
  const float running = exp_approx(running_lse - highest);
  const float block = exp_approx(block_lse - highest);
  const float sum = running + block;
  return {highest + logf(sum), running / sum, block / sum};
}

}  // namespace dilated::kernels::cuda

// From a pair's score, query . key, to its weight in the row's softmax, and from the gradient of
// the weight back to the score's. A mask, a bias or a soft cap changes only this file.
//
//   logit = scale * score + log(multiplicity), -inf where the row may not look
//   weight = exp(logit - reference)      forward: of any reference, divided by the sum in the end
//   weight = exp(logit - lse)            backward: the row's share
//   dscore = weight * (dweight - delta)  times scale where it is written
#pragma once

#include <dilated/pattern_layout.h>

#include <cfloat>
#include <cstdint>

#include "kernels/cuda/primitives/numerics.cuh"

namespace dilated::kernels::cuda {

/// Every kernel rounds a logit like this, so that forward and backward agree that a lone key weighs
/// 1, at any score. bias: log of the multiplicity.
__device__ inline float logit_of(float score, float scale, float bias) {
  return fmaf(score, scale, bias);
}

/// Windows with one end, for which one comparison does.
struct From {
  int32_t first;
};
struct Through {
  int32_t last;
};

/// Whether a row sees a column: the one mask, causal or of the pattern's windows.
__device__ inline bool sees(const From& window, int32_t column) { return column >= window.first; }
__device__ inline bool sees(const Through& window, int32_t column) { return column <= window.last; }
__device__ inline bool sees(const Window& window, int32_t column) {
  return window.first <= column && column <= window.last;
}
template <typename Seen>
__device__ inline float masked_logit(float logit, const Seen& window, int32_t column) {
  return sees(window, column) ? logit : negative_infinity();
}
template <typename Seen>
__device__ inline float masked_weight(float weight, const Seen& window, int32_t column) {
  return sees(window, column) ? weight : 0;
}

/// A row's reference for weights: -inf, which it is before the first key, would make them NaN.
__device__ inline float finite(float reference) { return fmaxf(reference, -FLT_MAX); }

/// exp(logit - reference); exactly 1 for the reference itself.
__device__ inline float weight_of(float logit, float finite_reference) {
  return exp_approx(logit - finite_reference);
}

/// The same from a score, by one multiply-add and one rounding less, for rows that have one bias
/// and no mask. scale_log2: scale * log2(e).
__device__ inline float quick_offset(float finite_reference, float bias_log2) {
  return fmaf(finite_reference, -kLog2E, bias_log2);
}
__device__ inline float quick_weight(float score, float scale_log2, float offset) {
  return exp2_approx(fmaf(score, scale_log2, offset));
}

/// What weights taken against `before` are multiplied by, to be against `reference`.
__device__ inline float rescaling(float before, float reference) {
  return before == negative_infinity() ? 0 : exp_approx(before - reference);
}

/// logit - lse, at most 0, however the two were rounded. NaN stays NaN.
__device__ inline float softmax_logit(float logit, float lse) {
  float difference = logit - lse;
  asm("min.NaN.f32 %0, %0, 0f00000000;" : "+f"(difference));
  return difference;
}

/// exp(logit - lse), at most 1.
__device__ inline float softmax_weight(float logit, float lse) {
  return exp_approx(softmax_logit(logit, lse));
}

/// lse as softmax_logit() takes it: +inf gives a row that attends to nothing weights of 0.
__device__ inline float weight_lse(float lse) {
  return lse == negative_infinity() ? -negative_infinity() : lse;
}

__device__ inline float score_gradient(float weight, float weight_gradient, float delta) {
  return weight * (weight_gradient - delta);
}

}  // namespace dilated::kernels::cuda

// From a pair's score, scale * query . key, to its weight in the row's softmax, and from the
// gradient of the weight back to the score's. A mask, a bias or a soft cap changes only this file.
// For one vector of rows and one column.
//
//   logit = score + log(multiplicity), -inf where the row may not look
//   weight = exp(logit - reference)      forward: of any reference, divided by the sum in the end
//   weight = exp(logit - lse)            backward: the row's share
//   dscore = weight * (dweight - delta)
#pragma once

#include "kernels/cpu/simd.h"

namespace dilated::kernels::cpu::DILATED_ISA {

/// bias: log of the multiplicity.
template <typename T>
[[gnu::always_inline]] inline Vector<T> logit_of(Vector<T> score, T bias) {
  return score + bias;
}

/// x where the row sees the column, which lies in its window (lanes.h), else `hidden`.
template <typename T>
[[gnu::always_inline]] inline Vector<T> masked(Vector<T> x, IntVector<T> first, IntVector<T> last,
                                               typename Simd<T>::Int column, Vector<T> hidden) {
  return (first <= column) & (column <= last) ? x : hidden;
}

/// exp(logit - lse), at most 1, however the two were rounded.
template <typename T>
[[gnu::always_inline]] inline Vector<T> softmax_weight(Vector<T> logit, Vector<T> lse) {
  const Vector<T> difference = logit - lse;
  return exp<T>(difference > Vector<T>{} ? Vector<T>{} : difference);
}

/// lse as softmax_weight() takes it: +inf gives a query that attends to nothing weights of 0.
template <typename T>
inline T weight_lse(T lse) {
  const T infinity = static_cast<T>(__builtin_inf());
  return lse == -infinity ? infinity : lse;
}

template <typename T>
[[gnu::always_inline]] inline Vector<T> score_gradient(Vector<T> weight, Vector<T> weight_gradient,
                                                       Vector<T> delta) {
  return weight * (weight_gradient - delta);
}

}  // namespace dilated::kernels::cpu::DILATED_ISA

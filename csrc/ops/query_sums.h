// The gradient of the queries, summed up in place by blocks of keys and rounded once: what a ring's
// backward does instead of adding gradients.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "ops/attention.h"

namespace dilated::ops {

using KeyGradients = std::tuple<at::Tensor, at::Tensor>;  // of key and value

/// Throws c10::ValueError unless they are [batch, heads, rows of query,
/// query_sums_width(head_dim)], contiguous, in lse's dtype and on query's device. Works on fake
/// tensors.
void check_query_sums(const at::Tensor& query, const at::Tensor& sums);

/// That the sums share no memory with what the call reads; not for fake tensors.
void check_sums_apart(const AttentionCall& call, const BackwardInputs& inputs,
                      const at::Tensor& sums);

/// Where kernels do not add to the sums by themselves: their columns are then head_dim's, in order.
void add_to_sums(const at::Tensor& sums, const at::Tensor& grad_query);
at::Tensor round_sums(const at::Tensor& sums, const at::Tensor& query);

}  // namespace dilated::ops

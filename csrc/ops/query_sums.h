// grad_query as sums to which a ring's blocks of keys add in place, rounded once at the end.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/attention.h"

namespace dilated::ops {

/// Throws c10::ValueError unless they are [batch, heads, rows of query,
/// query_sums_width(head_dim)], contiguous, in lse's dtype and on query's device. Works on fake
/// tensors.
void check_query_sums(const at::Tensor& query, const at::Tensor& sums);

/// That the sums share no memory with what the call reads; not for fake tensors.
void check_sums_apart(const AttentionCall& call, const BackwardInputs& inputs,
                      const at::Tensor& sums);

/// attention_block_backward_into where all tensors are on the CPU.
KeyGradients backward_into_cpu(const AttentionCall& call, const BackwardInputs& inputs,
                               at::Tensor& sums);

/// For kernels that do not add to sums: the first head_dim columns then hold grad_query, in order.
void add_to_sums(const at::Tensor& sums, const at::Tensor& grad_query);
at::Tensor round_sums(const at::Tensor& sums, const at::Tensor& query);

}  // namespace dilated::ops

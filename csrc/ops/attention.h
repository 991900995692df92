// From an operator's arguments to a kernel's, the same for every device.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/attention.h"
#include "ops/checks.h"

namespace dilated::ops {

/// The outputs of a forward call, allocated but not written, and what the kernel is given. `inputs`
/// keeps alive what the arguments point into; args.pattern and args.dropout.seed are the device's
/// business.
struct ForwardCall {
  at::Tensor out, lse;
  at::Tensor query, key, value;
  kernels::ForwardArgs args{};
};
ForwardCall prepare_forward(const AttentionCall& call);

struct BackwardInputs {
  const at::Tensor& grad_out;
  const std::optional<at::Tensor>& grad_lse;
  const at::Tensor& out;
  const at::Tensor& lse;
};

/// Throws c10::ValueError where the forward's arguments or these are wrong. Works on fake tensors.
void check_backward(const AttentionCall& call, const BackwardInputs& inputs);

/// Likewise for a backward call; delta is allocated for the device to fill.
struct BackwardCall {
  at::Tensor grad_query, grad_key, grad_value;
  at::Tensor query, key, value, grad_out, out, lse, grad_lse, delta;  // grad_lse may be undefined
  kernels::BackwardArgs args{};
};
BackwardCall prepare_backward(const AttentionCall& call, const BackwardInputs& inputs);

/// The dtype of lse and delta.
at::ScalarType lse_dtype(const at::Tensor& query);

}  // namespace dilated::ops

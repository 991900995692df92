// From an operator's arguments to a kernel's, the same for every device.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/attention.h"
#include "ops/checks.h"

namespace dilated::ops {

/// The tensors of a forward call, and the kernel's arguments, which point into them. Outputs are
/// allocated, unless the call brings them, but not written; the device's code fills in args.pattern
/// and args.dropout.seed.
struct ForwardTensors {
  at::Tensor out, lse;
  at::Tensor query, key, value;
  at::Tensor far_key, far_value, running_out, running_lse;  // may be undefined
  kernels::ForwardArgs args{};
};
ForwardTensors prepare_forward(const AttentionCall& call);

/// Throws c10::ValueError if the call or the inputs are wrong. Works on fake tensors.
void check_backward(const AttentionCall& call, const BackwardInputs& inputs);

/// Likewise for a backward call; delta is allocated for the device to fill.
struct BackwardTensors {
  at::Tensor grad_query, grad_key, grad_value;
  at::Tensor query, key, value, grad_out, out, lse, grad_lse, delta;  // grad_lse may be undefined
  kernels::BackwardArgs args{};
};
BackwardTensors prepare_backward(const AttentionCall& call, const BackwardInputs& inputs,
                                 bool with_grad_query = true);

/// Checks and runs a call whose tensors are on the CPU.
Gradients backward_cpu(const AttentionCall& call, const BackwardInputs& inputs);

}  // namespace dilated::ops

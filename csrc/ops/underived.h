// Derivatives that are not there raise, rather than being silently zero.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

namespace dilated::ops {

/// Throws c10::ValueError where a tensor argument is not dense, and NotImplementedError where it
/// has a forward derivative.
void check_differentiated(const c10::OperatorHandle& op, const torch::jit::Stack& stack);

/// An autograd kernel: calls the operator below autograd, without tangents; going backward through
/// its results throws NotImplementedError.
void underived(const c10::OperatorHandle& op, torch::jit::Stack* stack);

}  // namespace dilated::ops

// Derivatives that are not there raise, rather than being silently zero.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <string>

namespace dilated::ops {

bool wants_gradient(const at::Tensor& tensor);

/// Throws NotImplementedError where it has a forward derivative.
void check_no_tangent(const at::Tensor& tensor, const std::string& op);

/// Throws NotImplementedError within torch.func's transforms, whose levels a C++ function does not
/// know.
void check_no_transform(const std::string& op);

/// Throws c10::ValueError where a tensor argument is not dense, and NotImplementedError where it
/// has a forward derivative.
void check_differentiated(const c10::OperatorHandle& op, const torch::jit::Stack& stack);

/// An autograd kernel: calls the operator below autograd, without tangents; going backward through
/// its results throws NotImplementedError.
void underived(const c10::OperatorHandle& op, torch::jit::Stack* stack);

}  // namespace dilated::ops

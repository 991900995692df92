#include "ops/underived.h"

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "ops/checks.h"

namespace dilated::ops {
namespace {

constexpr const char* kFirstOnly =
    " must not be differentiated: dilated attention has first derivatives in reverse mode, and no "
    "others";

using torch::autograd::variable_list;

/// The operator, whose results end the stack, with a backward that throws.
class Underived : public torch::autograd::Function<Underived> {
 public:
  template <typename... Tensors>
  static variable_list forward(torch::autograd::AutogradContext* ctx, const c10::OperatorHandle& op,
                               torch::jit::Stack* stack, const Tensors&... /*differentiated*/) {
    ctx->saved_data["name"] = op.schema().name();
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
    variable_list results;
    for (c10::IValue& result : torch::jit::pop(*stack, op.schema().returns().size())) {
      results.push_back(std::move(result).toTensor());
    }
    return results;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx,
                                const variable_list& /*grads*/) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, ctx->saved_data["name"].toStringRef(), kFirstOnly);
  }
};

constexpr size_t kMost = 9;  // tensors of an operator's arguments
using Tensors = std::array<std::optional<at::Tensor>, kMost>;

/// Those that a gradient is wanted of, among an operator's arguments, which end the stack.
Tensors differentiated(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  Tensors tensors;
  size_t count = 0;
  for (size_t i = stack.size() - op.schema().arguments().size(); i < stack.size(); ++i) {
    if (stack[i].isTensor() && stack[i].toTensor().requires_grad()) {
      tensors.at(count++) = stack[i].toTensor();
    }
  }
  return tensors;
}

}  // namespace

bool wants_gradient(const at::Tensor& tensor) {
  return tensor.requires_grad() && at::GradMode::is_enabled();
}

void check_no_tangent(const at::Tensor& tensor, const std::string& op) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor._fw_grad(/*level=*/0).defined(), op, kFirstOnly);
}

void check_no_transform(const std::string& op) {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (transforms == nullptr) {
    return;
  }
  bool active = false;
  try {
    transforms->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    active = true;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(!active, op,
                              " must not be differentiated by torch.func: of the Python functions "
                              "dilated_attention can be, without a group");
}

void check_differentiated(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = torch::jit::peek(stack, i, arguments.size());
    if (value.isTensor() && value.toTensor().defined()) {
      check_given(value.toTensor(), arguments[i].name().c_str());
      check_no_tangent(value.toTensor(), op.schema().name());
    }
  }
}

void underived(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_differentiated(op, *stack);
  const Tensors tensors = differentiated(op, *stack);
  if (!tensors[0].has_value() || !at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
    return;
  }
  const auto call = [&](const auto&... each) { return Underived::apply(op, stack, each...); };
  for (at::Tensor& result : std::apply(call, tensors)) {
    torch::jit::push(*stack, std::move(result));
  }
}

}  // namespace dilated::ops

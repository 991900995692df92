#include "ops/in_place.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <string_view>
#include <vector>

namespace dilated::ops {

void InPlaceKernel::check_no_gradient(const c10::OperatorHandle& op,
                                      const torch::jit::Stack& stack) const {
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = torch::jit::peek(stack, i, arguments.size());
    TORCH_CHECK(
        !value.isTensor() || !value.toTensor().defined() || !value.toTensor().requires_grad(),
        arguments[i].name(), ": must not require a gradient, got one that does: ",
        std::string_view(op.schema().name()).substr(std::string_view("dilated::").size()),
        " is not differentiable; ", instead_);
  }
}

void InPlaceKernel::operator()(const c10::OperatorHandle& op, c10::DispatchKeySet /*keys*/,
                               torch::jit::Stack* stack) {
  if (at::GradMode::is_enabled()) {
    check_no_gradient(op, *stack);
  }
  const auto& arguments = op.schema().arguments();
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::AliasInfo* alias = arguments[i].alias_info();
    if (alias != nullptr && alias->isWrite()) {
      written.push_back(torch::jit::peek(stack, i, arguments.size()).toTensor());
    }
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  op.callBoxed(stack);
  for (const at::Tensor& tensor : written) {
    tensor.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace dilated::ops

// Autograd and autocast of attention and ring_attention. Arguments after query, key and value pass
// through unread. A ring's steps, the block operators, have no gradients of their own.
#include <ATen/autocast_mode.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/attention_call.h"
#include "ops/checks.h"
#include "ops/in_place.h"
#include "ops/underived.h"

namespace dilated::ops {
namespace {

constexpr size_t kRows = 3;  // query, key, value: an operator's first arguments

/// The gradients of an operator whose backward takes (grad_out, grad_lse, query, key, value, out,
/// lse) and then what the forward takes after value.
template <Form kForm>
class AttentionFunction : public torch::autograd::Function<AttentionFunction<kForm>> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                const at::Tensor& query, const at::Tensor& key,
                                                const at::Tensor& value,
                                                const c10::OperatorHandle& op,
                                                torch::jit::Stack* stack) {
    torch::jit::Stack rest(stack->end() - rest_of(op), stack->end());
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
    at::Tensor lse = torch::jit::pop(*stack).toTensor();
    at::Tensor out = torch::jit::pop(*stack).toTensor();
    torch::autograd::variable_list tensors{query, key, value, out, lse};
    c10::List<c10::IValue> others(c10::AnyType::get());
    for (c10::IValue& argument : rest) {
      tensors.push_back(argument.isTensor() ? argument.toTensor() : at::Tensor());
      others.push_back(argument.isTensor() ? c10::IValue() : std::move(argument));
    }
    ctx->save_for_backward(std::move(tensors));
    ctx->saved_data["others"] = others;
    ctx->set_materialize_grads(false);
    return {out, lse};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    torch::autograd::variable_list result(kRows + 2);  // as many as forward() takes
    if (kForm != Form::kRing && !grads[0].defined() && !grads[1].defined()) {
      return result;  // in a ring the other ranks wait for this one
    }
    auto saved = ctx->get_saved_variables();
    torch::jit::Stack stack{grads[0].defined() ? grads[0] : at::zeros_like(saved[kRows]),
                            grads[1].defined() ? c10::IValue(grads[1]) : c10::IValue()};
    stack.insert(stack.end(), saved.begin(), saved.begin() + kRows + 2);
    const auto others = ctx->saved_data["others"].toList();
    for (size_t i = 0; i < others.size(); ++i) {
      const at::Tensor& tensor = saved[kRows + 2 + i];
      stack.push_back(tensor.defined() ? c10::IValue(tensor) : others.get(i));
    }
    static const c10::OperatorHandle op =
        find_operator(kForm == Form::kRing ? "ring_attention_backward" : "attention_backward");
    op.callBoxed(stack);
    for (size_t i = 0; i < kRows; ++i) {
      result[i] = stack[i].toTensor();
    }
    return result;
  }

 private:
  static ptrdiff_t rest_of(const c10::OperatorHandle& op) {
    return static_cast<ptrdiff_t>(op.schema().arguments().size() - kRows);
  }
};

template <Form kForm>
void autograd_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const at::Tensor query = torch::jit::peek(stack, 0, count).toTensor();
  const at::Tensor key = torch::jit::peek(stack, 1, count).toTensor();
  const at::Tensor value = torch::jit::peek(stack, 2, count).toTensor();
  check_given(query, "query");
  check_given(key, "key");
  check_given(value, "value");
  check_differentiated(op, *stack);
  if (wants_gradient(query) || wants_gradient(key) || wants_gradient(value)) {
    check_no_transform(op.schema().name());
    auto results = AttentionFunction<kForm>::apply(query, key, value, op, stack);
    torch::jit::push(stack, std::move(results[0]), std::move(results[1]));
  } else {
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.callBoxed(stack);
  }
}

template <c10::DispatchKey kAutocast, c10::DeviceType kDevice>
void autocast_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kAutocast);
  for (size_t i = 0; i < kRows; ++i) {
    c10::IValue& rows = torch::jit::peek(stack, i, op.schema().arguments().size());
    rows = at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), rows.toTensor(),
                                     kDevice);
  }
  op.callBoxed(stack);
}

template <c10::DispatchKey kAutocast, c10::DeviceType kDevice>
void register_autocast(torch::Library& m) {
  for (const char* name : {"attention", "ring_attention"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&autocast_kernel<kAutocast, kDevice>>());
  }
}

}  // namespace
}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, Autograd, m) {
  using namespace dilated::ops;
  using torch::CppFunction;
  m.impl("attention", CppFunction::makeFromBoxedFunction<&autograd_kernel<Form::kSequence>>());
  m.impl("ring_attention", CppFunction::makeFromBoxedFunction<&autograd_kernel<Form::kRing>>());
  // Second derivatives, and gradients of a ring's single step.
  for (const char* name : {"attention_backward", "ring_attention_backward", "attention_block",
                           "attention_block_backward", "round_query_sums"}) {
    m.impl(name, CppFunction::makeFromBoxedFunction<&underived>());
  }
  for (const char* name : {"attention_block_into", "attention_block_backward_into"}) {
    m.impl(name, in_place("use torch.no_grad()"));
  }
}

TORCH_LIBRARY_IMPL(dilated, AutocastCPU, m) {
  dilated::ops::register_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>(m);
}

TORCH_LIBRARY_IMPL(dilated, AutocastCUDA, m) {
  dilated::ops::register_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>(m);
}

// Attention on every device: gradients, fake tensors, autocast, the C++ functions, and the
// one-branch form.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros_like.h>
#include <dilated/ops.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/signatures.h"

namespace dilated {
namespace ops {
namespace {

using Backward = decltype(attention_backward_with<backward_meta>);

const c10::TypedOperatorHandle<Backward>& backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dilated::attention_backward", "")
                             .typed<Backward>();
  return op;
}

class AttentionFunction : public torch::autograd::Function<AttentionFunction> {
 public:
  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
      const at::Tensor& value, c10::SymIntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
      const OptionalTensor& head_offsets, bool is_causal, const OptionalScalar& scale,
      std::string_view padding, double dropout_p, const OptionalTensor& dropout_seed,
      const OptionalTensor& pattern) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, lse] =
        attention_op().call(query, key, value, segment_lengths, dilation_rates, head_offsets,
                            is_causal, scale, padding, dropout_p, dropout_seed, pattern);
    const auto tensor_or_none = [](const OptionalTensor& tensor) {
      return tensor.value_or(at::Tensor());
    };
    ctx->save_for_backward({query, key, value, out, lse, tensor_or_none(head_offsets),
                            tensor_or_none(dropout_seed), tensor_or_none(pattern)});
    ctx->saved_data["segment_lengths"] = segment_lengths;
    ctx->saved_data["dilation_rates"] = dilation_rates;
    ctx->saved_data["is_causal"] = is_causal;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["padding"] = std::string(padding);
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->set_materialize_grads(false);
    return {out, lse};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &query = saved[0], &key = saved[1], &value = saved[2], &out = saved[3],
                     &lse = saved[4];
    const auto optional = [](const at::Tensor& tensor) {
      return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
    };
    torch::autograd::variable_list result(12);
    if (!grads[0].defined() && !grads[1].defined()) {
      return result;
    }
    const at::Tensor grad_out = grads[0].defined() ? grads[0] : at::zeros_like(out);
    auto& data = ctx->saved_data;
    std::tie(result[0], result[1], result[2]) = backward_op().call(
        grad_out, optional(grads[1]), query, key, value, out, lse,
        data["segment_lengths"].toSymIntVector(), data["dilation_rates"].toIntVector(),
        optional(saved[5]), data["is_causal"].toBool(), data["scale"].toOptional<at::Scalar>(),
        data["padding"].toStringRef(), data["dropout_p"].toDouble(), optional(saved[6]),
        optional(saved[7]));
    return result;
  }
};

/// Whether anything is to be derived, backward or forward: the latter is refused by
/// AttentionFunction.
bool is_differentiated(const at::Tensor& tensor) {
  return (tensor.requires_grad() && at::GradMode::is_enabled()) ||
         tensor._fw_grad(/*level=*/0).defined();
}

std::tuple<at::Tensor, at::Tensor> attention_autograd(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    c10::SymIntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
    const OptionalTensor& head_offsets, bool is_causal, const OptionalScalar& scale,
    std::string_view padding, double dropout_p, const OptionalTensor& dropout_seed,
    const OptionalTensor& pattern) {
  check_given(query, "query");
  check_given(key, "key");
  check_given(value, "value");
  if (!is_differentiated(query) && !is_differentiated(key) && !is_differentiated(value)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return attention_op().call(query, key, value, segment_lengths, dilation_rates, head_offsets,
                               is_causal, scale, padding, dropout_p, dropout_seed, pattern);
  }
  const auto result =
      AttentionFunction::apply(query, key, value, segment_lengths, dilation_rates, head_offsets,
                               is_causal, scale, padding, dropout_p, dropout_seed, pattern);
  return {result[0], result[1]};
}

template <c10::DispatchKey kAutocast, c10::DeviceType kDevice>
std::tuple<at::Tensor, at::Tensor> attention_autocast(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    c10::SymIntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
    const OptionalTensor& head_offsets, bool is_causal, const OptionalScalar& scale,
    std::string_view padding, double dropout_p, const OptionalTensor& dropout_seed,
    const OptionalTensor& pattern) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kAutocast);
  const auto cast = [](const at::Tensor& tensor) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), tensor, kDevice);
  };
  return attention_op().call(cast(query), cast(key), cast(value), segment_lengths, dilation_rates,
                             head_offsets, is_causal, scale, padding, dropout_p, dropout_seed,
                             pattern);
}

}  // namespace

const c10::TypedOperatorHandle<AttentionForward>& attention_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dilated::attention", "")
                             .typed<AttentionForward>();
  return op;
}

std::tuple<at::Tensor, at::Tensor> forward_meta(const AttentionCall& call) {
  check_call(call);
  const at::Tensor& query = call.query;
  return {query.new_empty_symint(query.sym_sizes(), query.options().dtype(result_dtype(call))),
          query.new_empty_symint({query.sym_size(0), query.sym_size(2), query.sym_size(1)},
                                 query.options().dtype(lse_dtype(query)))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_meta(const AttentionCall& call,
                                                             const BackwardInputs& inputs) {
  check_backward(call, inputs);
  const auto like = [&](const at::Tensor& tensor) {
    return tensor.new_empty_symint(tensor.sym_sizes(), tensor.options().dtype(result_dtype(call)));
  };
  return {like(call.query), like(call.key), like(call.value)};
}

}  // namespace ops

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& query, const at::Tensor& key,
                                             const at::Tensor& value,
                                             at::IntArrayRef segment_lengths,
                                             at::IntArrayRef dilation_rates,
                                             const AttentionOptions& options) {
  return ops::attention_op().call(query, key, value, c10::fromIntArrayRefSlow(segment_lengths),
                                  dilation_rates, options.head_offsets, options.is_causal,
                                  options.scale, options.padding, options.dropout_p,
                                  options.dropout_seed, options.pattern);
}

}  // namespace dilated

TORCH_LIBRARY_IMPL(dilated, Autograd, m) {
  m.impl("attention", &dilated::ops::attention_autograd);
  // A second derivative raises instead of being silently zero.
  m.impl("attention_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(dilated, Meta, m) {
  using namespace dilated::ops;
  m.impl("attention", &attention_with<forward_meta>);
  m.impl("attention_backward", &attention_backward_with<backward_meta>);
}

TORCH_LIBRARY_IMPL(dilated, AutocastCPU, m) {
  m.impl("attention", &dilated::ops::attention_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
}

TORCH_LIBRARY_IMPL(dilated, AutocastCUDA, m) {
  m.impl("attention", &dilated::ops::attention_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

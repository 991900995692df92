// Attention over a sequence that is sharded over processes: gradients, fake tensors, autocast. The
// exchange between the processes is the Python layer's, which registers the CPU and CUDA kernels.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>

#include "ops/signatures.h"

namespace dilated::ops {
namespace {

Results ring_meta(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  c10::SymIntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
                  std::string_view /*group_name*/, const OptionalTensor& head_offsets,
                  bool is_causal, const OptionalScalar& scale, std::string_view padding,
                  double dropout_p, const OptionalTensor& dropout_seed,
                  at::OptionalSymIntArrayRef /*shard_lengths*/, std::string_view /*strategy*/) {
  return forward_meta({query, key, value, segment_lengths, dilation_rates, head_offsets, is_causal,
                       scale, padding, dropout_p, dropout_seed, std::nullopt});
}

Gradients ring_backward_meta(const at::Tensor& grad_out, const OptionalTensor& grad_lse,
                             const at::Tensor& query, const at::Tensor& key,
                             const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
                             c10::SymIntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
                             std::string_view /*group_name*/, const OptionalTensor& head_offsets,
                             bool is_causal, const OptionalScalar& scale, std::string_view padding,
                             double dropout_p, const OptionalTensor& dropout_seed,
                             at::OptionalSymIntArrayRef /*shard_lengths*/,
                             std::string_view /*strategy*/) {
  return backward_meta({query, key, value, segment_lengths, dilation_rates, head_offsets, is_causal,
                        scale, padding, dropout_p, dropout_seed, std::nullopt},
                       {grad_out, grad_lse, out, lse});
}

const c10::TypedOperatorHandle<decltype(ring_meta)>& ring_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dilated::ring_attention", "")
                             .typed<decltype(ring_meta)>();
  return op;
}

const c10::TypedOperatorHandle<decltype(ring_backward_meta)>& ring_backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dilated::ring_attention_backward", "")
                             .typed<decltype(ring_backward_meta)>();
  return op;
}

class RingFunction : public torch::autograd::Function<RingFunction> {
 public:
  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
      const at::Tensor& value, c10::SymIntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
      std::string_view group_name, const OptionalTensor& head_offsets, bool is_causal,
      const OptionalScalar& scale, std::string_view padding, double dropout_p,
      const OptionalTensor& dropout_seed, at::OptionalSymIntArrayRef shard_lengths,
      std::string_view strategy) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, lse] =
        ring_op().call(query, key, value, segment_lengths, dilation_rates, group_name, head_offsets,
                       is_causal, scale, padding, dropout_p, dropout_seed, shard_lengths, strategy);
    ctx->save_for_backward({query, key, value, out, lse, head_offsets.value_or(at::Tensor()),
                            dropout_seed.value_or(at::Tensor())});
    auto& data = ctx->saved_data;
    data["segment_lengths"] = segment_lengths;
    data["dilation_rates"] = dilation_rates;
    data["group_name"] = std::string(group_name);
    data["is_causal"] = is_causal;
    data["scale"] = scale;
    data["padding"] = std::string(padding);
    data["dropout_p"] = dropout_p;
    data["shard_lengths"] = shard_lengths.has_value() ? c10::IValue(*shard_lengths) : c10::IValue();
    data["strategy"] = std::string(strategy);
    ctx->set_materialize_grads(false);
    return {out, lse};
  }

  /// Exchanges with the other ranks, all of which have to come here.
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto optional = [](const at::Tensor& tensor) {
      return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
    };
    auto& data = ctx->saved_data;
    std::optional<std::vector<c10::SymInt>> shard_lengths;
    if (!data["shard_lengths"].isNone()) {
      shard_lengths = data["shard_lengths"].toSymIntVector();
    }
    const auto segment_lengths = data["segment_lengths"].toSymIntVector();
    const auto dilation_rates = data["dilation_rates"].toIntVector();
    const at::OptionalSymIntArrayRef lengths =
        shard_lengths.has_value() ? at::OptionalSymIntArrayRef(*shard_lengths) : std::nullopt;
    torch::autograd::variable_list result(14);
    const at::Tensor grad_out = grads[0].defined() ? grads[0] : at::zeros_like(saved[3]);
    std::tie(result[0], result[1], result[2]) = ring_backward_op().call(
        grad_out, optional(grads[1]), saved[0], saved[1], saved[2], saved[3], saved[4],
        segment_lengths, dilation_rates, data["group_name"].toStringRef(), optional(saved[5]),
        data["is_causal"].toBool(), data["scale"].toOptional<at::Scalar>(),
        data["padding"].toStringRef(), data["dropout_p"].toDouble(), optional(saved[6]), lengths,
        data["strategy"].toStringRef());
    return result;
  }
};

Results ring_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      c10::SymIntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
                      std::string_view group_name, const OptionalTensor& head_offsets,
                      bool is_causal, const OptionalScalar& scale, std::string_view padding,
                      double dropout_p, const OptionalTensor& dropout_seed,
                      at::OptionalSymIntArrayRef shard_lengths, std::string_view strategy) {
  check_given(query, "query");
  check_given(key, "key");
  check_given(value, "value");
  const auto result = RingFunction::apply(query, key, value, segment_lengths, dilation_rates,
                                          group_name, head_offsets, is_causal, scale, padding,
                                          dropout_p, dropout_seed, shard_lengths, strategy);
  return {result[0], result[1]};
}

template <c10::DispatchKey kAutocast, c10::DeviceType kDevice>
Results ring_autocast(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      c10::SymIntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
                      std::string_view group_name, const OptionalTensor& head_offsets,
                      bool is_causal, const OptionalScalar& scale, std::string_view padding,
                      double dropout_p, const OptionalTensor& dropout_seed,
                      at::OptionalSymIntArrayRef shard_lengths, std::string_view strategy) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kAutocast);
  const auto cast = [](const at::Tensor& tensor) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), tensor, kDevice);
  };
  return ring_op().call(cast(query), cast(key), cast(value), segment_lengths, dilation_rates,
                        group_name, head_offsets, is_causal, scale, padding, dropout_p,
                        dropout_seed, shard_lengths, strategy);
}

}  // namespace
}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, Autograd, m) {
  m.impl("ring_attention", &dilated::ops::ring_autograd);
  m.impl("ring_attention_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(dilated, Meta, m) {
  m.impl("ring_attention", &dilated::ops::ring_meta);
  m.impl("ring_attention_backward", &dilated::ops::ring_backward_meta);
}

TORCH_LIBRARY_IMPL(dilated, AutocastCPU, m) {
  m.impl("ring_attention", &dilated::ops::ring_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
}

TORCH_LIBRARY_IMPL(dilated, AutocastCUDA, m) {
  m.impl("ring_attention", &dilated::ops::ring_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

#include "ops/query_sums.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/signatures.h"

namespace dilated::ops {
namespace {

at::Tensor in_order(const at::Tensor& sums, int64_t head_dim) {
  return sums.narrow(3, 0, head_dim).transpose(1, 2);
}

KeyGradients backward_into_cpu(const AttentionCall& call, const BackwardInputs& inputs,
                               at::Tensor& sums) {
  check_query_sums(call.query, sums);
  check_sums_apart(call, inputs, sums);
  const auto [grad_query, grad_key, grad_value] = backward_cpu(call, inputs);
  add_to_sums(sums, grad_query);
  return {grad_key, grad_value};
}

KeyGradients backward_into_meta(const AttentionCall& call, const BackwardInputs& inputs,
                                at::Tensor& sums) {
  check_query_sums(call.query, sums);
  const auto [grad_query, grad_key, grad_value] = backward_meta(call, inputs);
  return {grad_key, grad_value};
}

/// Written by hand as the fallback does not count writes to what is not returned.
KeyGradients backward_into_autograd(const AttentionCall& call, const BackwardInputs& inputs,
                                    at::Tensor& sums) {
  check_no_gradient("attention_block_backward_into",
                    {{"query", &call.query},
                     {"key", &call.key},
                     {"value", &call.value},
                     {"grad_out", &inputs.grad_out},
                     {"grad_lse", inputs.grad_lse.has_value() ? &*inputs.grad_lse : nullptr},
                     {"out", &inputs.out},
                     {"lse", &inputs.lse},
                     {"grad_query_sums", &sums}},
                    "use torch.no_grad()");
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("dilated::attention_block_backward_into", "")
          .typed<decltype(attention_block_backward_into_with<backward_into_meta>)>();
  const AttentionBlock& block = *call.block;
  const at::AutoDispatchBelowADInplaceOrView guard;
  const KeyGradients result =
      op.call(sums, inputs.grad_out, inputs.grad_lse, call.query, call.key, call.value, inputs.out,
              inputs.lse, block.seq_len, block.query_begin, block.key_begin, call.segment_lengths,
              call.dilation_rates, call.head_offsets, call.is_causal, call.scale, call.padding,
              call.dropout_p, call.dropout_seed, call.pattern);
  sums.unsafeGetTensorImpl()->bump_version();
  return result;
}

at::Tensor round_query_sums_cpu(const at::Tensor& sums, const at::Tensor& query,
                                const OptionalScalar& scale) {
  check_query_sums(query, sums);
  check_scale(query, scale);
  return round_sums(sums, query);
}

at::Tensor round_query_sums_meta(const at::Tensor& sums, const at::Tensor& query,
                                 const OptionalScalar& scale) {
  check_query_sums(query, sums);
  check_scale(query, scale);
  return query.new_empty_symint(query.sym_sizes(), query.options());
}

}  // namespace

void check_query_sums(const at::Tensor& query, const at::Tensor& sums) {
  check_input(query, "query");
  check_tensor(sums, "grad_query_sums");
  const auto width = (query.sym_size(3) + 15) / 16 * 16;
  TORCH_CHECK_VALUE(sums.dim() == 4 && sums.sym_size(0) == query.sym_size(0) &&
                        sums.sym_size(1) == query.sym_size(2) &&
                        sums.sym_size(2) == query.sym_size(1) && sums.sym_size(3) == width,
                    "grad_query_sums: must be [batch, heads, rows of query, head_dim rounded up to "
                    "16], got ",
                    sums.sym_sizes(), " for query ", query.sym_sizes());
  TORCH_CHECK_VALUE(sums.scalar_type() == lse_dtype(query) && sums.device() == query.device(),
                    "grad_query_sums: must be ", dtype_name(lse_dtype(query)), " on ",
                    query.device(), ", got ", dtype_name(sums.scalar_type()), " on ",
                    sums.device());
  TORCH_CHECK_VALUE(sums.is_contiguous(), "grad_query_sums: must be contiguous, got strides ",
                    sums.sym_strides());
}

void check_sums_apart(const AttentionCall& call, const BackwardInputs& inputs,
                      const at::Tensor& sums) {
  check_apart("grad_query_sums", sums,
              {{"grad_out", &inputs.grad_out},
               {"grad_lse", inputs.grad_lse.has_value() ? &*inputs.grad_lse : nullptr},
               {"query", &call.query},
               {"key", &call.key},
               {"value", &call.value},
               {"out", &inputs.out},
               {"lse", &inputs.lse}});
}

void add_to_sums(const at::Tensor& sums, const at::Tensor& grad_query) {
  in_order(sums, grad_query.size(3)).add_(grad_query);
}

at::Tensor round_sums(const at::Tensor& sums, const at::Tensor& query) {
  return at::empty(query.sizes(), query.options()).copy_(in_order(sums, query.size(3)));
}

}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, CPU, m) {
  using namespace dilated::ops;
  m.impl("attention_block_backward_into", &attention_block_backward_into_with<backward_into_cpu>);
  m.impl("round_query_sums", &round_query_sums_cpu);
}

TORCH_LIBRARY_IMPL(dilated, Meta, m) {
  using namespace dilated::ops;
  m.impl("attention_block_backward_into", &attention_block_backward_into_with<backward_into_meta>);
  m.impl("round_query_sums", &round_query_sums_meta);
}

TORCH_LIBRARY_IMPL(dilated, Autograd, m) {
  using namespace dilated::ops;
  m.impl("attention_block_backward_into",
         &attention_block_backward_into_with<backward_into_autograd>);
  m.impl("round_query_sums", torch::autograd::autogradNotImplementedFallback());
}

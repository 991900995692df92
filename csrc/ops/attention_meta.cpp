// Fake calls of the attention operators: all checks that need no data, and results' shapes.
#include "ops/attention.h"
#include "ops/attention_kernels.h"
#include "ops/query_sums.h"

namespace dilated::ops {
namespace {

Results forward_meta(const AttentionCall& call) {
  check_call(call);
  const at::Tensor& query = call.query;
  return {query.new_empty_symint(query.sym_sizes(), query.options().dtype(result_dtype(call))),
          query.new_empty_symint({query.sym_size(0), query.sym_size(2), query.sym_size(1)},
                                 query.options().dtype(lse_dtype(query)))};
}

Gradients backward_meta(const AttentionCall& call, const BackwardInputs& inputs) {
  check_backward(call, inputs);
  const auto like = [&](const at::Tensor& tensor) {
    return tensor.new_empty_symint(tensor.sym_sizes(), tensor.options().dtype(result_dtype(call)));
  };
  return {like(call.query), like(call.key), like(call.value)};
}

KeyGradients backward_into_meta(const AttentionCall& call, const BackwardInputs& inputs,
                                at::Tensor& sums) {
  check_query_sums(call.query, sums);
  const auto [grad_query, grad_key, grad_value] = backward_meta(call, inputs);
  return {grad_key, grad_value};
}

}  // namespace
}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, Meta, m) {
  using namespace dilated::ops;
  register_device<forward_meta, backward_meta, backward_into_meta>(m);
  register_attention<forward_meta, backward_meta, Form::kRing>(m, "ring_attention");
}

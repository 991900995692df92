#include "ops/query_sums.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace dilated::ops {
namespace {

at::Tensor in_order(const at::Tensor& sums, int64_t head_dim) {
  return sums.narrow(3, 0, head_dim).transpose(1, 2);
}

at::Tensor make_query_sums(const at::Tensor& query) {
  check_input(query, "query");
  return query.new_zeros_symint({query.sym_size(0), query.sym_size(2), query.sym_size(1),
                                 kernels::query_sums_width(query.sym_size(3))},
                                query.options().dtype(lse_dtype(query)));
}

at::Tensor round_query_sums_cpu(const at::Tensor& sums, const at::Tensor& query,
                                const std::optional<at::Scalar>& scale) {
  check_query_sums(query, sums);
  check_scale(query, scale_number(scale));
  return round_sums(sums, query);
}

at::Tensor round_query_sums_meta(const at::Tensor& sums, const at::Tensor& query,
                                 const std::optional<at::Scalar>& scale) {
  check_query_sums(query, sums);
  check_scale(query, scale_number(scale));
  return query.new_empty_symint(query.sym_sizes(), query.options());
}

}  // namespace

void check_query_sums(const at::Tensor& query, const at::Tensor& sums) {
  check_input(query, "query");
  check_tensor(sums, "grad_query_sums");
  const c10::SymInt width = kernels::query_sums_width(query.sym_size(3));
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

KeyGradients backward_into_cpu(const AttentionCall& call, const BackwardInputs& inputs,
                               at::Tensor& sums) {
  check_query_sums(call.query, sums);
  check_sums_apart(call, inputs, sums);
  const auto [grad_query, grad_key, grad_value] = backward_cpu(call, inputs);
  add_to_sums(sums, grad_query);
  return {grad_key, grad_value};
}

at::Tensor round_sums(const at::Tensor& sums, const at::Tensor& query) {
  return at::empty(query.sizes(), query.options()).copy_(in_order(sums, query.size(3)));
}

}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, CompositeExplicitAutograd, m) {
  m.impl("make_query_sums", &dilated::ops::make_query_sums);
}

// New zeros depend on no values, and have no gradient.
TORCH_LIBRARY_IMPL(dilated, Autograd, m) {
  m.impl("make_query_sums", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(dilated, CPU, m) {
  m.impl("round_query_sums", &dilated::ops::round_query_sums_cpu);
}

TORCH_LIBRARY_IMPL(dilated, Meta, m) {
  m.impl("round_query_sums", &dilated::ops::round_query_sums_meta);
}

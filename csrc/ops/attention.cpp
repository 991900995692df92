#include "ops/attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <array>

#include "kernels/cpu/attention.h"

namespace dilated::ops {
namespace {

/// Fills what forward and backward share, but for the data that lies on the device.
void fill_common(const AttentionCall& call, kernels::AttentionArgs& args) {
  args.dtype = dtype_of(call.query);
  args.batch = call.query.size(0);
  args.heads = call.query.size(2);
  args.kv_heads = call.key.size(2);
  args.head_dim = call.query.size(3);
  args.queries = call.query.size(1);
  args.keys = call.key.size(1);
  args.is_causal = call.is_causal;
  args.scale64 = scale_of(call);
  args.scale = static_cast<float>(args.scale64);
  args.dropout = {static_cast<float>(call.dropout_p), 1.0 - call.dropout_p, nullptr};
}

at::Tensor empty_rows(const at::Tensor& like) {
  return at::empty_like(like, like.options(), at::MemoryFormat::Contiguous);
}

/// The pattern's words on the host: the caller's, or planned into `storage`.
const int32_t* host_pattern(const AttentionCall& call, std::vector<int32_t>& storage) {
  const PatternSpec spec = spec_of(call);
  if (call.pattern.has_value()) {
    check_contents(*call.pattern, spec);
    return call.pattern->const_data_ptr<int32_t>();
  }
  storage = plan(spec);
  return storage.data();
}

const int64_t* host_seed(const AttentionCall& call) {
  return call.dropout_p > 0.0 ? call.dropout_seed->const_data_ptr<int64_t>() : nullptr;
}

std::tuple<at::Tensor, at::Tensor> attention_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
    const std::optional<at::Tensor>& head_offsets, bool is_causal, std::optional<double> scale,
    std::string_view padding, double dropout_p, const std::optional<at::Tensor>& dropout_seed,
    const std::optional<at::Tensor>& pattern) {
  const AttentionCall call{query,     key,   value,   segment_lengths, dilation_rates, head_offsets,
                           is_causal, scale, padding, dropout_p,       dropout_seed,   pattern};
  check_call(call);
  ForwardCall forward = prepare_forward(call);
  std::vector<int32_t> words;
  forward.args.pattern = host_pattern(call, words);
  forward.args.dropout.seed = host_seed(call);
  kernels::cpu::attention_forward(forward.args);
  return {forward.out, forward.lse};
}

/// [B, H, N]: rowsum(grad_out * out) - grad_lse.
void fill_delta(BackwardCall& backward) {
  const auto dtype = backward.delta.scalar_type();
  backward.delta.copy_(
      at::sum(at::mul(backward.grad_out.to(dtype), backward.out.to(dtype)), -1).transpose(1, 2));
  if (backward.grad_lse.defined()) {
    backward.delta.sub_(backward.grad_lse);
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward_cpu(
    const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
    at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
    const std::optional<at::Tensor>& head_offsets, bool is_causal, std::optional<double> scale,
    std::string_view padding, double dropout_p, const std::optional<at::Tensor>& dropout_seed,
    const std::optional<at::Tensor>& pattern) {
  const AttentionCall call{query,     key,   value,   segment_lengths, dilation_rates, head_offsets,
                           is_causal, scale, padding, dropout_p,       dropout_seed,   pattern};
  check_backward(call, {grad_out, grad_lse, out, lse});
  BackwardCall backward = prepare_backward(call, {grad_out, grad_lse, out, lse});
  fill_delta(backward);
  std::vector<int32_t> words;
  backward.args.pattern = host_pattern(call, words);
  backward.args.dropout.seed = host_seed(call);
  kernels::cpu::attention_backward(backward.args);
  return {backward.grad_query, backward.grad_key, backward.grad_value};
}

}  // namespace

at::ScalarType lse_dtype(const at::Tensor& query) {
  return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

ForwardCall prepare_forward(const AttentionCall& call) {
  ForwardCall forward;
  forward.query = readable(call.query);
  forward.key = readable(call.key);
  forward.value = readable(call.value);
  forward.out = empty_rows(call.query);
  forward.lse = at::empty({call.query.size(0), call.query.size(2), call.query.size(1)},
                          call.query.options().dtype(lse_dtype(call.query)));
  kernels::ForwardArgs& args = forward.args;
  fill_common(call, args);
  args.query = rows_of(forward.query);
  args.key = rows_of(forward.key);
  args.value = rows_of(forward.value);
  args.out = mutable_rows_of(forward.out);
  args.lse = forward.lse.mutable_data_ptr();
  return forward;
}

void check_backward(const AttentionCall& call, const BackwardInputs& inputs) {
  check_call(call);
  const at::Tensor& query = call.query;
  const auto like_query = [&](const at::Tensor& tensor, const char* name) {
    TORCH_CHECK_VALUE(tensor.sym_sizes() == query.sym_sizes() &&
                          tensor.scalar_type() == query.scalar_type() &&
                          tensor.device() == query.device(),
                      name, ": must have the shape, dtype and device of query, ", query.sym_sizes(),
                      " ", query.scalar_type(), " ", query.device(), ", got ", tensor.sym_sizes(),
                      " ", tensor.scalar_type(), " ", tensor.device());
  };
  like_query(inputs.grad_out, "grad_out");
  like_query(inputs.out, "out");
  const std::array<c10::SymInt, 3> rows{query.sym_size(0), query.sym_size(2), query.sym_size(1)};
  const auto row_sums = [&](const at::Tensor& tensor, const char* name) {
    TORCH_CHECK_VALUE(
        tensor.sym_sizes() == c10::SymIntArrayRef(rows) && tensor.device() == query.device(), name,
        ": must be [batch, heads, seq_len] = ", c10::SymIntArrayRef(rows), " on ", query.device(),
        ", got ", tensor.sym_sizes(), " on ", tensor.device());
  };
  row_sums(inputs.lse, "lse");
  TORCH_CHECK_VALUE(inputs.lse.scalar_type() == lse_dtype(query), "lse: must be ", lse_dtype(query),
                    ", got ", inputs.lse.scalar_type());
  if (inputs.grad_lse.has_value() && inputs.grad_lse->defined()) {
    row_sums(*inputs.grad_lse, "grad_lse");
  }
}

BackwardCall prepare_backward(const AttentionCall& call, const BackwardInputs& inputs) {
  const at::Tensor& query = call.query;
  BackwardCall backward;
  backward.query = readable(query);
  backward.key = readable(call.key);
  backward.value = readable(call.value);
  backward.grad_out = readable(inputs.grad_out);
  backward.out = readable(inputs.out);
  backward.lse = inputs.lse.contiguous();
  if (inputs.grad_lse.has_value() && inputs.grad_lse->defined()) {
    backward.grad_lse = inputs.grad_lse->to(lse_dtype(query)).contiguous();
  }
  backward.delta = at::empty_like(backward.lse);
  backward.grad_query = empty_rows(query);
  backward.grad_key = empty_rows(call.key);
  backward.grad_value = empty_rows(call.value);
  kernels::BackwardArgs& args = backward.args;
  fill_common(call, args);
  args.query = rows_of(backward.query);
  args.key = rows_of(backward.key);
  args.value = rows_of(backward.value);
  args.grad_out = rows_of(backward.grad_out);
  args.lse = backward.lse.const_data_ptr();
  args.delta = backward.delta.const_data_ptr();
  args.grad_query = mutable_rows_of(backward.grad_query);
  args.grad_key = mutable_rows_of(backward.grad_key);
  args.grad_value = mutable_rows_of(backward.grad_value);
  return backward;
}

}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, CPU, m) {
  m.impl("attention", &dilated::ops::attention_cpu);
  m.impl("attention_backward", &dilated::ops::attention_backward_cpu);
}

#include "ops/attention.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <limits>

#include "kernels/cpu/attention.h"
#include "ops/attention_kernels.h"
#include "ops/checked_patterns.h"
#include "ops/planned_patterns.h"
#include "ops/query_sums.h"

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
  args.is_partial = call.block.has_value() && call.block->partial;
  args.scale64 = scale_of(call.query, call.scale);
  args.scale = static_cast<float>(args.scale64);
  constexpr float kLargest = 1 - std::numeric_limits<float>::epsilon() / 2;  // below 1
  args.dropout = {std::min(static_cast<float>(call.dropout_p), kLargest), 1.0 - call.dropout_p,
                  nullptr};
}

/// Of the same shape, for results that kernels write: zeros where some rows are in no sequence.
at::Tensor result_rows(const AttentionCall& call, const at::Tensor& like) {
  at::Tensor rows =
      at::empty_like(like, like.options().dtype(result_dtype(call)), at::MemoryFormat::Contiguous);
  return has_gaps(call) ? rows.zero_() : rows;
}

/// The pattern on the host, the caller's or the operators' own; keeps alive what args.pattern
/// points to.
at::Tensor place_pattern(const AttentionCall& call, Directions reads,
                         kernels::AttentionArgs& args) {
  if (call.pattern.has_value()) {
    check_contents(*call.pattern, spec_of(call, reads));
  }
  at::Tensor words =
      call.pattern.has_value() ? *call.pattern : planned_patterns().lend(call, reads).words;
  args.pattern = words.const_data_ptr<int32_t>();
  args.dropout.seed = call.dropout_p > 0.0 ? call.dropout_seed->const_data_ptr<int64_t>() : nullptr;
  return words;
}

/// [B, H, N]: rowsum(grad_out * out) - grad_lse.
void fill_delta(BackwardTensors& backward) {
  const auto dtype = backward.delta.scalar_type();
  backward.delta.copy_(
      at::sum(at::mul(backward.grad_out.to(dtype), backward.out.to(dtype)), -1).transpose(1, 2));
  if (backward.grad_lse.defined()) {
    backward.delta.sub_(backward.grad_lse);
  }
}

}  // namespace

ForwardTensors prepare_forward(const AttentionCall& call) {
  ForwardTensors forward;
  forward.query = readable(call.query);
  forward.key = readable(call.key);
  forward.value = readable(call.value);
  if (call.far.has_value()) {
    check_results_apart(call);
    forward.out = *call.block->out;
    forward.lse = *call.block->lse;
  } else {
    forward.out = result_rows(call, call.query);
    forward.lse = at::empty({call.query.size(0), call.query.size(2), call.query.size(1)},
                            call.query.options().dtype(lse_dtype(call.query)));
  }
  if (has_gaps(call) && !call.far.has_value()) {
    forward.lse.fill_(-std::numeric_limits<double>::infinity());
  }
  kernels::ForwardArgs& args = forward.args;
  fill_common(call, args);
  args.query = rows_of(forward.query);
  args.key = rows_of(forward.key);
  args.value = rows_of(forward.value);
  args.out = mutable_rows_of(forward.out);
  args.lse = forward.lse.mutable_data_ptr();
  if (call.far.has_value() && call.far->key.has_value()) {
    forward.far_key = readable(*call.far->key);
    forward.far_value = readable(*call.far->value);
    args.far_keys = forward.far_key.size(1);
    args.far_key = rows_of(forward.far_key);
    args.far_value = rows_of(forward.far_value);
  }
  if (!call.far.has_value() && call.block.has_value() && call.block->out.has_value()) {
    forward.running_out = readable(*call.block->out);
    forward.running_lse = call.block->lse->contiguous();
    args.running_out = rows_of(forward.running_out);
    args.running_lse = forward.running_lse.const_data_ptr();
  }
  return forward;
}

void check_backward(const AttentionCall& call, const BackwardInputs& inputs) {
  check_call(call);
  const at::Tensor& query = call.query;
  check_rows(query, inputs.grad_out, query.scalar_type(), "grad_out");
  check_rows(query, inputs.out, query.scalar_type(), "out");
  check_lse(query, inputs.lse, "lse");
  if (inputs.grad_lse.has_value() && inputs.grad_lse->defined()) {
    check_lse(query, *inputs.grad_lse, "grad_lse");
  }
}

BackwardTensors prepare_backward(const AttentionCall& call, const BackwardInputs& inputs,
                                 bool with_grad_query) {
  const at::Tensor& query = call.query;
  BackwardTensors backward;
  backward.query = readable(query);
  backward.key = readable(call.key);
  backward.value = readable(call.value);
  backward.grad_out = readable(inputs.grad_out);
  backward.out = readable(inputs.out);
  backward.lse = inputs.lse.contiguous();
  if (inputs.grad_lse.has_value() && inputs.grad_lse->defined()) {
    backward.grad_lse = inputs.grad_lse->contiguous();
  }
  backward.delta = at::empty_like(backward.lse);
  backward.grad_key = result_rows(call, call.key);
  backward.grad_value = result_rows(call, call.value);
  kernels::BackwardArgs& args = backward.args;
  fill_common(call, args);
  args.query = rows_of(backward.query);
  args.key = rows_of(backward.key);
  args.value = rows_of(backward.value);
  args.grad_out = rows_of(backward.grad_out);
  args.lse = backward.lse.const_data_ptr();
  args.delta = backward.delta.const_data_ptr();
  if (with_grad_query) {
    backward.grad_query = result_rows(call, query);
    args.grad_query = mutable_rows_of(backward.grad_query);
  }
  args.grad_key = mutable_rows_of(backward.grad_key);
  args.grad_value = mutable_rows_of(backward.grad_value);
  return backward;
}

Gradients backward_cpu(const AttentionCall& call, const BackwardInputs& inputs) {
  check_backward(call, inputs);
  BackwardTensors backward = prepare_backward(call, inputs);
  fill_delta(backward);
  const at::Tensor words = place_pattern(call, Directions::kBoth, backward.args);
  kernels::cpu::attention_backward(backward.args, at::globalContext().deterministicAlgorithms());
  return {backward.grad_query, backward.grad_key, backward.grad_value};
}

namespace {

Results forward_cpu(const AttentionCall& call) {
  check_call(call);
  ForwardTensors forward = prepare_forward(call);
  const at::Tensor words = place_pattern(call, Directions::kForward, forward.args);
  kernels::cpu::attention_forward(forward.args);
  return {forward.out, forward.lse};
}

}  // namespace
}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, CPU, m) {
  using namespace dilated::ops;
  register_device<forward_cpu, backward_cpu, backward_into_cpu>(m);
}

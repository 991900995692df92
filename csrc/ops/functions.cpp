// The attention operators' C++ functions.
#include <c10/util/Exception.h>

#include <tuple>

#include "ops/attention_call.h"

namespace dilated {
namespace {

using torch::jit::Stack;

template <typename... Tensors>
std::tuple<Tensors...> results(Stack& stack) {
  std::tuple<Tensors...> popped;
  std::apply([&](auto&... tensors) { torch::jit::pop(stack, tensors...); }, popped);
  return popped;
}

}  // namespace

ops::Results attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                       at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
                       const AttentionOptions& options) {
  static const c10::OperatorHandle op = ops::find_operator("attention");
  Stack stack{query, key, value, segment_lengths, dilation_rates};
  ops::push_options(stack, options);
  op.callBoxed(stack);
  return results<at::Tensor, at::Tensor>(stack);
}

ops::Results segment_attention(const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, int64_t segment_length,
                               int64_t dilation_rate, const AttentionOptions& options) {
  return attention(query, key, value, segment_length, dilation_rate, options);
}

ops::Results attention_block(const at::Tensor& query, const at::Tensor& key,
                             const at::Tensor& value, const AttentionBlock& block,
                             at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
                             const AttentionOptions& options) {
  static const c10::OperatorHandle op = ops::find_operator("attention_block");
  Stack stack{query,         key,        value,           block.seq_len,
              block.queries, block.keys, segment_lengths, dilation_rates,
              block.out,     block.lse};
  ops::push_options(stack, options);
  stack.emplace_back(block.partial);
  op.callBoxed(stack);
  return results<at::Tensor, at::Tensor>(stack);
}

void attention_block_into(const at::Tensor& out, const at::Tensor& lse, const at::Tensor& query,
                          const at::Tensor& key, const at::Tensor& value, const FarKeys& far,
                          const AttentionBlock& block, at::IntArrayRef segment_lengths,
                          at::IntArrayRef dilation_rates, const AttentionOptions& options) {
  TORCH_CHECK_VALUE(!block.out.has_value() && !block.lse.has_value() && !block.partial,
                    "block: must hold no running result and not be partial where results are "
                    "written into tensors, got ",
                    block.partial ? "partial = true" : "out or lse");
  static const c10::OperatorHandle op = ops::find_operator("attention_block_into");
  Stack stack{out,
              lse,
              query,
              key,
              value,
              far.key,
              far.value,
              block.seq_len,
              block.queries,
              block.keys,
              far.keys,
              segment_lengths,
              dilation_rates,
              far.rows};
  ops::push_options(stack, options);
  op.callBoxed(stack);
}

ops::Gradients attention_block_backward(
    const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
    const AttentionBlock& block, at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
    const AttentionOptions& options) {
  TORCH_CHECK_VALUE(!block.out.has_value() && !block.lse.has_value(),
                    "block: must hold no running result, out and lse, for the backward, got ",
                    block.out.has_value() ? "out" : "lse");
  static const c10::OperatorHandle op = ops::find_operator("attention_block_backward");
  Stack stack{grad_out, grad_lse,      query,         key,        value,           out,
              lse,      block.seq_len, block.queries, block.keys, segment_lengths, dilation_rates};
  ops::push_options(stack, options);
  stack.emplace_back(block.partial);
  op.callBoxed(stack);
  return results<at::Tensor, at::Tensor, at::Tensor>(stack);
}

}  // namespace dilated

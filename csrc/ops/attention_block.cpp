// Attention over a block of a longer sequence, continuing a running result: a step of a ring. Every
// device runs attention's own code with the block added to the call.
#include <ATen/core/dispatch/Dispatcher.h>
#include <dilated/ops.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/signatures.h"

namespace dilated {

ops::Results attention_block(const at::Tensor& query, const at::Tensor& key,
                             const at::Tensor& value, const AttentionBlock& block,
                             at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
                             const AttentionOptions& options) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dilated::attention_block", "")
                             .typed<decltype(ops::attention_block_with<ops::forward_meta>)>();
  return op.call(query, key, value, block.seq_len, block.query_begin, block.key_begin,
                 c10::fromIntArrayRefSlow(segment_lengths), dilation_rates, block.out, block.lse,
                 options.head_offsets, options.is_causal, options.scale, options.padding,
                 options.dropout_p, options.dropout_seed, options.pattern, block.partial);
}

ops::Gradients attention_block_backward(
    const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
    const AttentionBlock& block, at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
    const AttentionOptions& options) {
  TORCH_CHECK_VALUE(!block.out.has_value() && !block.lse.has_value(),
                    "block: out and lse, a running result, must not be given to the backward, got ",
                    block.out.has_value() ? "out" : "lse");
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("dilated::attention_block_backward", "")
          .typed<decltype(ops::attention_block_backward_with<ops::backward_meta>)>();
  return op.call(grad_out, grad_lse, query, key, value, out, lse, block.seq_len, block.query_begin,
                 block.key_begin, c10::fromIntArrayRefSlow(segment_lengths), dilation_rates,
                 options.head_offsets, options.is_causal, options.scale, options.padding,
                 options.dropout_p, options.dropout_seed, options.pattern, block.partial);
}

}  // namespace dilated

TORCH_LIBRARY_IMPL(dilated, CPU, m) {
  using namespace dilated::ops;
  m.impl("attention_block", &attention_block_with<forward_cpu>);
  m.impl("attention_block_backward", &attention_block_backward_with<backward_cpu>);
}

TORCH_LIBRARY_IMPL(dilated, Meta, m) {
  using namespace dilated::ops;
  m.impl("attention_block", &attention_block_with<forward_meta>);
  m.impl("attention_block_backward", &attention_block_backward_with<backward_meta>);
}

TORCH_LIBRARY_IMPL(dilated, Autograd, m) {
  // A ring differentiates its steps together: one of them has no gradient of its own.
  m.impl("attention_block", torch::autograd::autogradNotImplementedFallback());
  m.impl("attention_block_backward", torch::autograd::autogradNotImplementedFallback());
}

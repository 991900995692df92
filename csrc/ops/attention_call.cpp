#include "ops/attention_call.h"

#include <ATen/core/Formatting.h>
#include <c10/util/Exception.h>

namespace dilated::ops {
namespace {

/// In the order of kOptionsText.
void take_options(Arguments& arguments, AttentionOptions& options) {
  options.head_offsets = arguments.take<OptionalTensor>();
  options.is_causal = arguments.take<bool>();
  options.scale = scale_number(arguments.take<std::optional<at::Scalar>>());
  options.padding = arguments.take<std::string>();
  options.dropout_p = arguments.take<double>();
  options.dropout_seed = arguments.take<OptionalTensor>();
  options.sequences = arguments.take<OptionalTensor>();
}

}  // namespace

void push_options(torch::jit::Stack& stack, const AttentionOptions& options) {
  torch::jit::push(stack, options.head_offsets, options.is_causal, options.scale, options.padding,
                   options.dropout_p, options.dropout_seed, options.sequences, options.pattern);
}

AttentionCall take_call(Arguments& arguments, Form form, BackwardInputs* inputs) {
  AttentionCall call;
  const bool is_block = form == Form::kBlock || form == Form::kInto;
  if (is_block) {
    call.block.emplace();
  }
  if (form == Form::kInto) {
    call.block->out = arguments.take<at::Tensor>();
    call.block->lse = arguments.take<at::Tensor>();
    call.far.emplace();
  }
  if (inputs != nullptr) {
    inputs->grad_out = arguments.take<at::Tensor>();
    inputs->grad_lse = arguments.take<OptionalTensor>();
  }
  call.query = arguments.take<at::Tensor>();
  call.key = arguments.take<at::Tensor>();
  call.value = arguments.take<at::Tensor>();
  if (inputs != nullptr) {
    inputs->out = arguments.take<at::Tensor>();
    inputs->lse = arguments.take<at::Tensor>();
  }
  if (call.far.has_value()) {
    call.far->key = arguments.take<OptionalTensor>();
    call.far->value = arguments.take<OptionalTensor>();
  }
  if (is_block) {
    call.block->seq_len = arguments.take<int64_t>();
    call.block->queries = arguments.take<std::vector<int64_t>>();
    call.block->keys = arguments.take<std::vector<int64_t>>();
  }
  if (call.far.has_value()) {
    call.far->keys = arguments.take<std::vector<int64_t>>();
  }
  call.segment_lengths = arguments.take<c10::IValue>().toSymIntVector();
  call.dilation_rates = arguments.take<c10::IValue>().toIntVector();
  if (form == Form::kRing) {
    arguments.take<c10::IValue>();  // the group's name, which the ring's kernels read
  }
  if (form == Form::kBlock && inputs == nullptr) {
    call.block->out = arguments.take<OptionalTensor>();
    call.block->lse = arguments.take<OptionalTensor>();
  }
  if (call.far.has_value()) {
    call.far->rows = arguments.take<std::string>();
  }
  take_options(arguments, call);
  if (form != Form::kRing) {
    call.pattern = arguments.take<OptionalTensor>();
  }
  if (form == Form::kBlock) {
    // attention_block_backward_into has no such argument: it is always partial.
    call.block->partial = arguments.empty() || arguments.take<bool>();
  }
  return call;
}

std::optional<double> scale_number(const std::optional<at::Scalar>& scale) {
  if (!scale.has_value() || scale->isSymbolic()) {
    return std::nullopt;
  }
  TORCH_CHECK_VALUE(!scale->isComplex() && !scale->isBoolean(),
                    "scale: must be a real number, got ", *scale);
  return scale->toDouble();
}

c10::OperatorHandle find_operator(std::string_view name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("dilated::" + std::string(name)).c_str(),
                                                        "");
}

}  // namespace dilated::ops

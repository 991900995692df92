// What a device does with a call, as the dispatcher's kernels of all attention operators.
#pragma once

#include <torch/library.h>

#include "ops/attention_call.h"

namespace dilated::ops {

using RunForward = Results (*)(const AttentionCall&);
using RunBackward = Gradients (*)(const AttentionCall&, const BackwardInputs&);
using RunBackwardInto = KeyGradients (*)(const AttentionCall&, const BackwardInputs&, at::Tensor&);

template <RunForward kRun, Form kForm>
void forward_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Arguments arguments(op, stack);
  arguments.replace_by(kRun(take_call(arguments, kForm)));
}

/// Writes into the call's block->out and block->lse.
template <RunForward kRun>
void forward_into_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Arguments arguments(op, stack);
  kRun(take_call(arguments, Form::kInto));
  arguments.replace_by(std::tuple<>());
}

template <RunBackward kRun, Form kForm>
void backward_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Arguments arguments(op, stack);
  BackwardInputs inputs;
  const AttentionCall call = take_call(arguments, kForm, &inputs);
  arguments.replace_by(kRun(call, inputs));
}

template <RunBackwardInto kRun>
void backward_into_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Arguments arguments(op, stack);
  auto sums = arguments.take<at::Tensor>();
  BackwardInputs inputs;
  const AttentionCall call = take_call(arguments, Form::kBlock, &inputs);
  arguments.replace_by(kRun(call, inputs, sums));
}

template <RunForward kForward, RunBackward kBackward, Form kForm>
void register_attention(torch::Library& m, const std::string& name) {
  using torch::CppFunction;
  m.impl(name.c_str(), CppFunction::makeFromBoxedFunction<&forward_kernel<kForward, kForm>>());
  m.impl((name + "_backward").c_str(),
         CppFunction::makeFromBoxedFunction<&backward_kernel<kBackward, kForm>>());
}

/// All but the ring's, which the Python layer computes.
template <RunForward kForward, RunBackward kBackward, RunBackwardInto kBackwardInto>
void register_device(torch::Library& m) {
  register_attention<kForward, kBackward, Form::kSequence>(m, "attention");
  register_attention<kForward, kBackward, Form::kBlock>(m, "attention_block");
  m.impl("attention_block_into",
         torch::CppFunction::makeFromBoxedFunction<&forward_into_kernel<kForward>>());
  m.impl("attention_block_backward_into",
         torch::CppFunction::makeFromBoxedFunction<&backward_into_kernel<kBackwardInto>>());
}

}  // namespace dilated::ops

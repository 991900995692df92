// Attention with a single branch: the same operator, spelt for one segment length and one rate.
#include <torch/library.h>

#include "ops/attention_call.h"

namespace dilated::ops {
namespace {

void segment_attention(const c10::OperatorHandle& segment_op, torch::jit::Stack* stack) {
  const size_t count = segment_op.schema().arguments().size();
  c10::IValue& length = torch::jit::peek(stack, 3, count);
  length = std::vector<c10::SymInt>{length.toSymInt()};
  c10::IValue& rate = torch::jit::peek(stack, 4, count);
  rate = std::vector<int64_t>{rate.toInt()};
  static const c10::OperatorHandle op = find_operator("attention");
  op.callBoxed(stack);
}

}  // namespace
}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, CompositeImplicitAutograd, m) {
  m.impl("segment_attention",
         torch::CppFunction::makeFromBoxedFunction<&dilated::ops::segment_attention>());
}

// Gradients of gather and scatter_add, each other's transposes, and their C++ functions.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros.h>
#include <dilated/ops.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/gather.h"
#include "ops/in_place.h"
#include "ops/underived.h"

namespace dilated {
namespace ops {
namespace {

using Gather = at::Tensor(const at::Tensor&, c10::SymInt, int64_t, const OptionalTensor&, int64_t);
using ScatterAdd = at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymInt, int64_t,
                              const OptionalTensor&, int64_t);
const c10::TypedOperatorHandle<Gather>& gather_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("dilated::gather", "").typed<Gather>();
  return op;
}

const c10::TypedOperatorHandle<ScatterAdd>& scatter_add_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dilated::scatter_add", "")
                             .typed<ScatterAdd>();
  return op;
}

/// Keeps the branch for the backward, which needs nothing else but the length of the stretch.
void save_branch(torch::autograd::AutogradContext* ctx, const BranchCall& branch) {
  ctx->save_for_backward({branch.head_offsets.value_or(at::Tensor())});
  ctx->saved_data["segment_length"] = branch.segment_length;
  ctx->saved_data["dilation_rate"] = branch.dilation_rate;
  ctx->saved_data["start"] = branch.start;
}

OptionalTensor saved_offsets(torch::autograd::AutogradContext* ctx) {
  const at::Tensor offsets = ctx->get_saved_variables()[0];
  return offsets.defined() ? OptionalTensor(offsets) : std::nullopt;
}

class GatherFunction : public torch::autograd::Function<GatherFunction> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& input,
                            c10::SymInt segment_length, int64_t dilation_rate,
                            const OptionalTensor& head_offsets, int64_t start) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor packed =
        gather_op().call(input, segment_length, dilation_rate, head_offsets, start);
    save_branch(ctx, {segment_length, dilation_rate, head_offsets, start});
    ctx->saved_data["length"] = input.sym_size(1);  // the call above checked the rank
    return packed;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    auto& data = ctx->saved_data;
    const at::Tensor& packed = grads[0];
    const at::Tensor zeros = packed.new_zeros_symint(
        {packed.sym_size(0), data["length"].toSymInt(), packed.sym_size(2), packed.sym_size(3)});
    return {scatter_add_op().call(zeros, packed, data["segment_length"].toSymInt(),
                                  data["dilation_rate"].toInt(), saved_offsets(ctx),
                                  data["start"].toInt()),
            at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

class ScatterAddFunction : public torch::autograd::Function<ScatterAddFunction> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& input,
                            const at::Tensor& packed, c10::SymInt segment_length,
                            int64_t dilation_rate, const OptionalTensor& head_offsets,
                            int64_t start) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    save_branch(ctx, {segment_length, dilation_rate, head_offsets, start});
    return scatter_add_op().call(input, packed, segment_length, dilation_rate, head_offsets, start);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    auto& data = ctx->saved_data;
    return {
        grads[0],
        gather_op().call(grads[0], data["segment_length"].toSymInt(), data["dilation_rate"].toInt(),
                         saved_offsets(ctx), data["start"].toInt()),
        at::Tensor(),
        at::Tensor(),
        at::Tensor(),
        at::Tensor()};
  }
};

at::Tensor gather_autograd(const at::Tensor& input, c10::SymInt segment_length,
                           int64_t dilation_rate, const OptionalTensor& head_offsets,
                           int64_t start) {
  check_given(input, "input");
  check_no_tangent(input, "dilated::gather");
  if (!wants_gradient(input)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return gather_op().call(input, segment_length, dilation_rate, head_offsets, start);
  }
  check_no_transform("dilated::gather");
  return GatherFunction::apply(input, segment_length, dilation_rate, head_offsets, start);
}

at::Tensor scatter_add_autograd(const at::Tensor& input, const at::Tensor& packed,
                                c10::SymInt segment_length, int64_t dilation_rate,
                                const OptionalTensor& head_offsets, int64_t start) {
  check_given(input, "input");
  check_given(packed, "packed");
  check_no_tangent(input, "dilated::scatter_add");
  check_no_tangent(packed, "dilated::scatter_add");
  if (!wants_gradient(input) && !wants_gradient(packed)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return scatter_add_op().call(input, packed, segment_length, dilation_rate, head_offsets, start);
  }
  check_no_transform("dilated::scatter_add");
  return ScatterAddFunction::apply(input, packed, segment_length, dilation_rate, head_offsets,
                                   start);
}

}  // namespace
}  // namespace ops

at::Tensor gather(const at::Tensor& input, int64_t segment_length, int64_t dilation_rate,
                  const std::optional<at::Tensor>& head_offsets, int64_t start) {
  return ops::gather_op().call(input, segment_length, dilation_rate, head_offsets, start);
}

at::Tensor scatter_add(const at::Tensor& input, const at::Tensor& packed, int64_t segment_length,
                       int64_t dilation_rate, const std::optional<at::Tensor>& head_offsets,
                       int64_t start) {
  return ops::scatter_add_op().call(input, packed, segment_length, dilation_rate, head_offsets,
                                    start);
}

}  // namespace dilated

TORCH_LIBRARY_IMPL(dilated, Autograd, m) {
  m.impl("gather", &dilated::ops::gather_autograd);
  m.impl("scatter_add", &dilated::ops::scatter_add_autograd);
  m.impl("gather_into", dilated::ops::in_place("call gather or use torch.no_grad()"));
  m.impl("scatter_into", dilated::ops::in_place("call scatter_add or use torch.no_grad()"));
}

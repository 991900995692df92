// An attention operator's arguments: as text of the schemas, as a struct, and on the dispatcher's
// stack. Options are named here, in attention_call.cpp and in dilated/ops.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <dilated/ops.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace dilated::ops {

using OptionalTensor = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor>;                // out, lse
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // of query, key, value
using KeyGradients = std::tuple<at::Tensor, at::Tensor>;           // of key, value

/// The options that all schemas have.
inline constexpr std::string_view kOptionsText =
    "Tensor? head_offsets=None, bool is_causal=False, Scalar? scale=None, "
    "str padding=\"masked\", float dropout_p=0.0, Tensor? dropout_seed=None, "
    "Tensor? sequences=None";

/// A call, whatever the operator.
struct AttentionCall : AttentionOptions {
  at::Tensor query, key, value;
  std::vector<c10::SymInt> segment_lengths;
  std::vector<int64_t> dilation_rates;
  std::optional<AttentionBlock> block;  // nullopt: the whole sequence
  std::optional<FarKeys> far;           // of attention_block_into
};

/// What a backward takes besides the call.
struct BackwardInputs {
  at::Tensor grad_out;
  OptionalTensor grad_lse;
  at::Tensor out, lse;
};

/// What an operator's rows are, which decides what else it takes.
enum class Form { kSequence, kBlock, kInto, kRing };

/// An operator's arguments on the dispatcher's stack, taken one by one, and its results.
class Arguments {
 public:
  Arguments(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : stack_(*stack), next_(stack->size() - op.schema().arguments().size()), first_(next_) {}

  bool empty() const { return next_ == stack_.size(); }

  template <typename T>
  T take() {
    return std::move(stack_[next_++]).to<T>();
  }

  template <typename... Tensors>
  void replace_by(std::tuple<Tensors...> results) {
    stack_.erase(stack_.begin() + static_cast<ptrdiff_t>(first_), stack_.end());
    std::apply([&](auto&&... tensors) { torch::jit::push(stack_, std::move(tensors)...); },
               std::move(results));
  }

 private:
  torch::jit::Stack& stack_;
  size_t next_, first_;
};

/// The call of an operator; `inputs` are filled where it is a backward. Throws c10::ValueError for
/// a scale that is no number.
AttentionCall take_call(Arguments& arguments, Form form, BackwardInputs* inputs = nullptr);

/// Pushes the options, for a call that begins in C++.
void push_options(torch::jit::Stack& stack, const AttentionOptions& options);

/// A scale as a number, nullopt where none is given or a compiler's symbol stands for it. Throws
/// c10::ValueError for a bool or a complex number.
std::optional<double> scale_number(const std::optional<at::Scalar>& scale);

/// torch.ops.dilated's operator of the name.
c10::OperatorHandle find_operator(std::string_view name);

}  // namespace dilated::ops

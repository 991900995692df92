// Autograd of operators that write into their arguments and have no gradients.
#pragma once

#include <torch/library.h>

namespace dilated::ops {

/// Calls the operator below autograd and counts the write, which torch's fallback does only for
/// tensors that are returned. Raises where a gradient is wanted, rather than giving none; `instead`
/// says what to do.
class InPlaceKernel : public c10::OperatorKernel {
 public:
  explicit InPlaceKernel(const char* instead) : instead_(instead) {}
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                  torch::jit::Stack* stack);

 private:
  void check_no_gradient(const c10::OperatorHandle& op, const torch::jit::Stack& stack) const;

  const char* instead_;
};

inline torch::CppFunction in_place(const char* instead) {
  return torch::CppFunction::makeFromBoxedFunctor(std::make_unique<InPlaceKernel>(instead));
}

}  // namespace dilated::ops

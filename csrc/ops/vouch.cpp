// Lets the caches vouch for words that they copied to a device, so that no call has to read them
// there and wait for the answer.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <dilated/pattern.h>
#include <torch/library.h>

#include <utility>

#include "ops/checked_patterns.h"
#include "ops/checks.h"

namespace dilated::ops {
namespace {

void vouch(const at::Tensor& copy, const at::Tensor& pattern) {
  TORCH_CHECK_VALUE(pattern.is_cpu() && pattern.scalar_type() == at::kInt && pattern.dim() == 1,
                    "pattern: must be a one-dimensional int32 tensor on the CPU, got ",
                    pattern.dim(), " dimensions on ", pattern.device());
  TORCH_CHECK_VALUE(copy.scalar_type() == at::kInt && copy.sizes() == pattern.sizes(),
                    "copy: must be an int32 tensor of pattern's shape, ", pattern.sizes(), ", got ",
                    copy.sizes());
  for (const auto& [tensor, name] : {std::pair(&copy, "copy"), std::pair(&pattern, "pattern")}) {
    check_tensor(*tensor, name);
    check_layout(*tensor, name);
  }
  checked_patterns().insert(copy, checked_header(pattern));
}

}  // namespace
}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, CPU, m) { m.impl("vouch", &dilated::ops::vouch); }

TORCH_LIBRARY_IMPL(dilated, CUDA, m) { m.impl("vouch", &dilated::ops::vouch); }

TORCH_LIBRARY_IMPL(dilated, Meta, m) {
  m.impl("vouch", [](const at::Tensor& /*copy*/, const at::Tensor& /*pattern*/) {});
}

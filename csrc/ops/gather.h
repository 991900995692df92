// From gather's and scatter_add's arguments to a kernel's, the same for every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/gather.h"

namespace dilated::ops {

/// The branch that gather and scatter_add are about, as the dispatcher hands it over.
struct BranchCall {
  int64_t segment_length, dilation_rate;
  const std::optional<at::Tensor>& head_offsets;
  int64_t start;
};

/// Checks the arguments of gather and allocates its result; args.offsets is the device's business.
struct GatherCall {
  at::Tensor rows, packed;
  kernels::GatherForwardArgs args{};
};
GatherCall prepare_gather(const at::Tensor& input, const BranchCall& branch);

/// Likewise for scatter_add; the result begins as a copy of input.
struct ScatterAddCall {
  at::Tensor rows, packed;
  kernels::ScatterAddArgs args{};
};
ScatterAddCall prepare_scatter_add(const at::Tensor& input, const at::Tensor& packed,
                                   const BranchCall& branch);

}  // namespace dilated::ops

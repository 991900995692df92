// From the arguments of gather, scatter_add and their in-place forms to a kernel's, on any device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/gather.h"

namespace dilated::ops {

/// The arguments that name the branch, as the dispatcher passes them.
struct BranchCall {
  c10::SymInt segment_length;
  int64_t dilation_rate;
  const std::optional<at::Tensor>& head_offsets;
  int64_t start;
};

/// Checks the rows, called `name`, and the branch; works on fake tensors.
void check_branch(const at::Tensor& rows, const BranchCall& branch, const char* name);

/// Checks scatter_add's arguments, before anything is allocated.
void check_scatter(const at::Tensor& input, const at::Tensor& packed, const BranchCall& branch);

/// Checks the arguments of gather and allocates its result, or takes gather_into's; the device's
/// code fills in args.offsets.
struct GatherCall {
  at::Tensor rows, packed;
  kernels::GatherForwardArgs args{};
};
GatherCall prepare_gather(const at::Tensor& input, const BranchCall& branch,
                          const std::optional<at::Tensor>& packed = std::nullopt);

/// Likewise for scatter_into, which changes `rows`; scatter_add passes a copy of its input.
struct ScatterCall {
  at::Tensor rows, packed;
  kernels::ScatterArgs args{};
};
ScatterCall prepare_scatter(const at::Tensor& rows, const at::Tensor& packed,
                            const BranchCall& branch, bool accumulate);

}  // namespace dilated::ops

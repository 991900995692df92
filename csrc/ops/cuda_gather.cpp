// CUDA entry points of gather, scatter_add and their in-place forms: pass the offsets, launch.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "kernels/cuda/gather.h"
#include "ops/cuda_capture.h"
#include "ops/gather.h"

namespace dilated::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

/// A table of offsets for a launch: among its arguments where it fits, else on the device.
struct Offsets {
  Offsets(const BranchCall& branch, const at::Device& device, kernels::GatherArgs& args) {
    if (!branch.head_offsets.has_value()) {
      return;
    }
    const at::Tensor& table = *branch.head_offsets;
    if (args.heads <= kernels::kInlineHeads) {
      const int64_t* values = table.const_data_ptr<int64_t>();
      std::copy(values, values + args.heads, inlined.values);
      inlined.given = true;
    } else {
      TORCH_CHECK(!is_capturing(), "head_offsets: must be of at most ", kernels::kInlineHeads,
                  " heads while a CUDA graph is captured, got ", args.heads,
                  ": a replay would not find the host memory of more");
      on_device = table.pin_memory().to(device, /*non_blocking=*/true);
      args.offsets = on_device.const_data_ptr<int64_t>();
    }
  }
  kernels::InlineOffsets inlined{};
  at::Tensor on_device;
};

at::Tensor launch_gather(GatherCall call, const BranchCall& branch) {
  const Offsets offsets(branch, call.rows.device(), call.args);
  if (call.packed.numel() > 0) {
    C10_CUDA_CHECK(
        kernels::cuda::gather(call.args, offsets.inlined, c10::cuda::getCurrentCUDAStream()));
  }
  return call.packed;
}

at::Tensor gather_cuda(const at::Tensor& input, c10::SymInt segment_length, int64_t dilation_rate,
                       const OptionalTensor& head_offsets, int64_t start) {
  const BranchCall branch{segment_length, dilation_rate, head_offsets, start};
  check_branch(input, branch, "input");
  const c10::cuda::CUDAGuard guard(input.device());
  return launch_gather(prepare_gather(input, branch), branch);
}

void gather_into_cuda(at::Tensor& packed, const at::Tensor& input, c10::SymInt segment_length,
                      int64_t dilation_rate, const OptionalTensor& head_offsets, int64_t start) {
  const BranchCall branch{segment_length, dilation_rate, head_offsets, start};
  check_branch(input, branch, "input");
  const c10::cuda::CUDAGuard guard(input.device());
  launch_gather(prepare_gather(input, branch, packed), branch);
}

void scatter_into_cuda(at::Tensor& rows, const at::Tensor& packed, c10::SymInt segment_length,
                       int64_t dilation_rate, const OptionalTensor& head_offsets, int64_t start,
                       bool accumulate) {
  const BranchCall branch{segment_length, dilation_rate, head_offsets, start};
  check_branch(rows, branch, "rows");
  const c10::cuda::CUDAGuard guard(rows.device());
  ScatterCall call = prepare_scatter(rows, packed, branch, accumulate);
  const Offsets offsets(branch, rows.device(), call.args);
  if (call.packed.numel() > 0) {
    C10_CUDA_CHECK(
        kernels::cuda::scatter(call.args, offsets.inlined, c10::cuda::getCurrentCUDAStream()));
  }
}

at::Tensor scatter_add_cuda(const at::Tensor& input, const at::Tensor& packed,
                            c10::SymInt segment_length, int64_t dilation_rate,
                            const OptionalTensor& head_offsets, int64_t start) {
  check_scatter(input, packed, {segment_length, dilation_rate, head_offsets, start});
  const c10::cuda::CUDAGuard guard(input.device());
  at::Tensor rows = input.clone(at::MemoryFormat::Contiguous);
  scatter_into_cuda(rows, packed, segment_length, dilation_rate, head_offsets, start, true);
  return rows;
}

}  // namespace
}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, CUDA, m) {
  m.impl("gather", &dilated::ops::gather_cuda);
  m.impl("scatter_add", &dilated::ops::scatter_add_cuda);
  m.impl("gather_into", &dilated::ops::gather_into_cuda);
  m.impl("scatter_into", &dilated::ops::scatter_into_cuda);
}

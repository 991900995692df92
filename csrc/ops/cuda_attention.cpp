// Attention on CUDA devices: puts the pattern and the workspace there and launches.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstring>

#include "kernels/cuda/attention.h"
#include "ops/checked_patterns.h"
#include "ops/signatures.h"

namespace dilated::ops {
namespace {

/// Whether a graph captures the current stream; never the default one, for which no driver is
/// asked.
bool is_capturing() {
  return c10::cuda::getCurrentCUDAStream().stream() != nullptr &&
         c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

/// Plans, and copies the words on the current stream.
at::Tensor planned_pattern(const PatternSpec& spec, const at::Device& device) {
  TORCH_CHECK(
      !is_capturing(),
      "pattern: must be given, on query's device, while a CUDA graph is captured: one that is "
      "planned on the spot comes from host memory that a replay would not find");
  const std::vector<int32_t> words = plan(spec);
  const at::Tensor pinned = at::empty({static_cast<int64_t>(words.size())},
                                      at::TensorOptions().dtype(at::kInt).pinned_memory(true));
  std::memcpy(pinned.mutable_data_ptr(), words.data(), words.size() * sizeof(int32_t));
  return pinned.to(device, /*non_blocking=*/true);
}

/// Has the device compare the pattern with the call, the first time that the two meet. A graph
/// compares in every replay: what it captured has not run yet, and the words may change until then.
void compare_fingerprint(const at::Tensor& pattern, uint64_t fingerprint) {
  static CheckedPatterns checked;
  if (is_capturing() || !checked.contains_or_insert(pattern, fingerprint)) {
    C10_CUDA_CHECK(kernels::cuda::compare_fingerprint(
        pattern.const_data_ptr<int32_t>(), fingerprint, c10::cuda::getCurrentCUDAStream()));
  }
}

/// The pattern on query's device, the caller's or a new one; keeps alive what args.pattern points
/// to.
at::Tensor place_pattern(const AttentionCall& call, kernels::AttentionArgs& args) {
  const PatternSpec spec = spec_of(call);
  at::Tensor pattern;
  if (call.pattern.has_value()) {
    pattern = *call.pattern;
    check_contents(pattern, spec);
    compare_fingerprint(pattern, fingerprint(spec));
  } else {
    pattern = planned_pattern(spec, call.query.device());
  }
  args.pattern = pattern.const_data_ptr<int32_t>();
  args.dropout.seed = call.dropout_p > 0.0 ? call.dropout_seed->const_data_ptr<int64_t>() : nullptr;
  return pattern;
}

Results forward_cuda(const AttentionCall& call) {
  check_call(call);
  const c10::cuda::CUDAGuard guard(call.query.device());
  ForwardCall forward = prepare_forward(call);
  const at::Tensor words = place_pattern(call, forward.args);
  if (call.query.numel() > 0) {
    C10_CUDA_CHECK(
        kernels::cuda::attention_forward(forward.args, c10::cuda::getCurrentCUDAStream()));
  }
  return {forward.out, forward.lse};
}

Gradients backward_cuda(const AttentionCall& call, const BackwardInputs& inputs) {
  check_backward(call, inputs);
  const c10::cuda::CUDAGuard guard(call.query.device());
  BackwardCall backward = prepare_backward(call, inputs);
  const at::Tensor words = place_pattern(call, backward.args);
  if (call.query.numel() == 0 && call.key.numel() == 0) {
    return {backward.grad_query, backward.grad_key, backward.grad_value};
  }
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  const float* grad_lse_data =
      backward.grad_lse.defined() ? backward.grad_lse.const_data_ptr<float>() : nullptr;
  C10_CUDA_CHECK(kernels::cuda::attention_delta(backward.args, rows_of(backward.out), grad_lse_data,
                                                backward.delta.mutable_data_ptr<float>(), stream));
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  const auto bytes = static_cast<int64_t>(
      kernels::cuda::attention_backward_workspace(backward.args, deterministic));
  const at::Tensor workspace = at::empty({bytes}, call.query.options().dtype(at::kByte));
  C10_CUDA_CHECK(kernels::cuda::attention_backward(backward.args, workspace.mutable_data_ptr(),
                                                   deterministic, stream));
  return {backward.grad_query, backward.grad_key, backward.grad_value};
}

}  // namespace
}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, CUDA, m) {
  using namespace dilated::ops;
  m.impl("attention", &attention_with<forward_cuda>);
  m.impl("attention_backward", &attention_backward_with<backward_cuda>);
  m.impl("attention_block", &attention_block_with<forward_cuda>);
  m.impl("attention_block_backward", &attention_block_backward_with<backward_cuda>);
}

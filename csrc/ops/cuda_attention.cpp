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
#include "ops/attention.h"
#include "ops/checked_patterns.h"

namespace dilated::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

/// Plans, and copies the words on the current stream.
at::Tensor planned_pattern(const PatternSpec& spec, const at::Device& device) {
  TORCH_CHECK(
      c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None,
      "pattern: must be given, on query's device, while a CUDA graph is captured: one that is "
      "planned on the spot comes from host memory that a replay would not find");
  const std::vector<int32_t> words = plan(spec);
  const at::Tensor pinned = at::empty({static_cast<int64_t>(words.size())},
                                      at::TensorOptions().dtype(at::kInt).pinned_memory(true));
  std::memcpy(pinned.mutable_data_ptr(), words.data(), words.size() * sizeof(int32_t));
  return pinned.to(device, /*non_blocking=*/true);
}

/// Has the device compare the pattern with the call, the first time that the two meet.
void compare_fingerprint(const at::Tensor& pattern, uint64_t fingerprint) {
  static CheckedPatterns checked;
  if (!checked.contains_or_insert(pattern, fingerprint)) {
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

std::tuple<at::Tensor, at::Tensor> attention_cuda(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
    const OptionalTensor& head_offsets, bool is_causal, std::optional<double> scale,
    std::string_view padding, double dropout_p, const OptionalTensor& dropout_seed,
    const OptionalTensor& pattern) {
  const AttentionCall call{query,     key,   value,   segment_lengths, dilation_rates, head_offsets,
                           is_causal, scale, padding, dropout_p,       dropout_seed,   pattern};
  check_call(call);
  const c10::cuda::CUDAGuard guard(query.device());
  ForwardCall forward = prepare_forward(call);
  const at::Tensor words = place_pattern(call, forward.args);
  if (query.numel() > 0) {
    C10_CUDA_CHECK(
        kernels::cuda::attention_forward(forward.args, c10::cuda::getCurrentCUDAStream()));
  }
  return {forward.out, forward.lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward_cuda(
    const at::Tensor& grad_out, const OptionalTensor& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
    at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
    const OptionalTensor& head_offsets, bool is_causal, std::optional<double> scale,
    std::string_view padding, double dropout_p, const OptionalTensor& dropout_seed,
    const OptionalTensor& pattern) {
  const AttentionCall call{query,     key,   value,   segment_lengths, dilation_rates, head_offsets,
                           is_causal, scale, padding, dropout_p,       dropout_seed,   pattern};
  check_backward(call, {grad_out, grad_lse, out, lse});
  const c10::cuda::CUDAGuard guard(query.device());
  BackwardCall backward = prepare_backward(call, {grad_out, grad_lse, out, lse});
  const at::Tensor words = place_pattern(call, backward.args);
  if (query.numel() == 0) {
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
  const at::Tensor workspace = at::empty({bytes}, query.options().dtype(at::kByte));
  C10_CUDA_CHECK(kernels::cuda::attention_backward(backward.args, workspace.mutable_data_ptr(),
                                                   deterministic, stream));
  return {backward.grad_query, backward.grad_key, backward.grad_value};
}

}  // namespace
}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, CUDA, m) {
  m.impl("attention", &dilated::ops::attention_cuda);
  m.impl("attention_backward", &dilated::ops::attention_backward_cuda);
}

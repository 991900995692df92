// Attention on CUDA devices: puts the pattern and what is worked with there, and launches.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <string_view>

#include "kernels/cuda/attention.h"
#include "ops/checked_patterns.h"
#include "ops/cuda_capture.h"
#include "ops/signatures.h"

namespace dilated::ops {
namespace {

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

/// Compares a pattern on the device with the call. Where neither a cache vouches for it nor an
/// earlier call has read it, the host waits for the device. A graph compares in every replay, and
/// stops the device: the words may change until then.
void check_on_device(const at::Tensor& pattern, const PatternSpec& spec) {
  const auto* words = pattern.const_data_ptr<int32_t>();
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  if (is_capturing()) {
    C10_CUDA_CHECK(kernels::cuda::require_pattern(words, pattern.numel(), fingerprint(spec),
                                                  static_cast<int32_t>(spec.directions), stream));
    return;
  }
  std::optional<PlannedFor> planned = checked_patterns().find(pattern);
  if (!planned.has_value()) {
    const at::Tensor found = at::empty({3}, pattern.options().dtype(at::kLong));
    C10_CUDA_CHECK(kernels::cuda::read_pattern(words, pattern.numel(),
                                               found.mutable_data_ptr<int64_t>(), stream));
    const at::Tensor answer = found.cpu();
    const auto* numbers = answer.const_data_ptr<int64_t>();
    check_planned(numbers[0] == 1);
    planned = {static_cast<uint64_t>(numbers[1]), static_cast<int32_t>(numbers[2])};
    checked_patterns().insert(pattern, *planned);
  }
  check_planned_for(*planned, spec);
}

/// The pattern on query's device, the caller's or a new one; keeps alive what args.pattern points
/// to.
at::Tensor place_pattern(const AttentionCall& call, Directions reads,
                         kernels::AttentionArgs& args) {
  const PatternSpec spec = spec_of(call, reads);
  at::Tensor pattern;
  if (call.pattern.has_value()) {
    pattern = *call.pattern;
    check_contents(pattern, spec);
    check_on_device(pattern, spec);
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
  const at::Tensor words = place_pattern(call, Directions::kForward, forward.args);
  if (call.query.numel() > 0) {
    C10_CUDA_CHECK(
        kernels::cuda::attention_forward(forward.args, c10::cuda::getCurrentCUDAStream()));
  }
  return {forward.out, forward.lse};
}

constexpr int64_t kCounterBytes = 256;  // in front of the sums, which are to be aligned

/// Most shared memory that a block may have: all of the device's, but for
/// DILATED_SHARED_MEMORY_BYTES, by which a large GPU runs what a smaller one does.
size_t allowed_shared_bytes() {
  static const size_t allowed = [] {
    size_t bytes = std::numeric_limits<size_t>::max();
    if (const char* text = std::getenv("DILATED_SHARED_MEMORY_BYTES"); text != nullptr) {
      const std::string_view digits = text;
      const auto [end, error] = std::from_chars(digits.begin(), digits.end(), bytes);
      TORCH_CHECK_VALUE(
          error == std::errc() && end == digits.end() && bytes >= kernels::cuda::kSharedBytes,
          "DILATED_SHARED_MEMORY_BYTES: must be a number of bytes, at least ",
          kernels::cuda::kSharedBytes, ", got \"", text, "\"");
    }
    return bytes;
  }();
  return allowed;
}

/// Whether the kernel adds grad_query up; on the current device.
bool adds_up(const at::Tensor& query) {
  bool adds_up = false;
  C10_CUDA_CHECK(kernels::cuda::backward_adds_up(dtype_of(query), query.size(3),
                                                 at::globalContext().deterministicAlgorithms(),
                                                 allowed_shared_bytes(), adds_up));
  return adds_up;
}

/// Zeros: the kernel's counter, which float32 does without, and so many numbers to add up in.
at::Tensor make_workspace(const at::Tensor& query, int64_t sums) {
  const int64_t bytes = query.scalar_type() == at::kFloat
                            ? 0
                            : kCounterBytes + sums * static_cast<int64_t>(sizeof(float));
  at::Tensor workspace = at::empty({bytes}, query.options().dtype(at::kByte));
  if (bytes > 0) {
    C10_CUDA_CHECK(cudaMemsetAsync(workspace.mutable_data_ptr(), 0, static_cast<size_t>(bytes),
                                   c10::cuda::getCurrentCUDAStream()));
  }
  return workspace;
}

/// Fills the gradients; sums as attention_backward takes them.
void run_backward(const AttentionCall& call, BackwardCall& backward, float* sums,
                  const at::Tensor& workspace) {
  const at::Tensor words = place_pattern(call, Directions::kBoth, backward.args);
  if (call.query.numel() == 0 && call.key.numel() == 0) {
    return;
  }
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  const float* grad_lse_data =
      backward.grad_lse.defined() ? backward.grad_lse.const_data_ptr<float>() : nullptr;
  C10_CUDA_CHECK(kernels::cuda::attention_delta(backward.args, rows_of(backward.out), grad_lse_data,
                                                backward.delta.mutable_data_ptr<float>(), stream));
  auto* counter = static_cast<unsigned long long*>(workspace.mutable_data_ptr());
  C10_CUDA_CHECK(kernels::cuda::attention_backward(backward.args, sums, counter,
                                                   allowed_shared_bytes(), stream));
}

void round_into(const at::Tensor& grad_query, double scale, float* sums) {
  const kernels::cuda::RoundedSums rounded{dtype_of(grad_query),       grad_query.size(0),
                                           grad_query.size(1),         grad_query.size(2),
                                           grad_query.size(3),         static_cast<float>(scale),
                                           mutable_rows_of(grad_query)};
  C10_CUDA_CHECK(kernels::cuda::round_query_sums(rounded, sums, c10::cuda::getCurrentCUDAStream()));
}

Gradients backward_cuda(const AttentionCall& call, const BackwardInputs& inputs) {
  check_backward(call, inputs);
  const at::Tensor& query = call.query;
  const c10::cuda::CUDAGuard guard(query.device());
  BackwardCall backward = prepare_backward(call, inputs);
  const bool has_sums = adds_up(query);
  const int64_t rows = query.size(0) * query.size(1) * query.size(2);
  const at::Tensor workspace =
      make_workspace(query, has_sums ? rows * kernels::query_sums_width(query.size(3)) : 0);
  float* sums = has_sums ? reinterpret_cast<float*>(
                               static_cast<char*>(workspace.mutable_data_ptr()) + kCounterBytes)
                         : nullptr;
  run_backward(call, backward, sums, workspace);
  if (has_sums) {
    round_into(backward.grad_query, backward.args.scale64, sums);
  }
  return {backward.grad_query, backward.grad_key, backward.grad_value};
}

/// The caller's sums, as the kernels read them.
float* sums_data(const at::Tensor& sums) {
  check_aligned(sums, "grad_query_sums");
  return sums.mutable_data_ptr<float>();
}

KeyGradients backward_into_cuda(const AttentionCall& call, const BackwardInputs& inputs,
                                at::Tensor& sums) {
  check_query_sums(call.query, sums);
  check_sums_apart(call, inputs, sums);
  const c10::cuda::CUDAGuard guard(call.query.device());
  if (!adds_up(call.query)) {
    const auto [grad_query, grad_key, grad_value] = backward_cuda(call, inputs);
    add_to_sums(sums, grad_query);
    return {grad_key, grad_value};
  }
  check_backward(call, inputs);
  BackwardCall backward = prepare_backward(call, inputs, /*with_grad_query=*/false);
  run_backward(call, backward, sums_data(sums), make_workspace(call.query, 0));
  return {backward.grad_key, backward.grad_value};
}

at::Tensor round_query_sums_cuda(const at::Tensor& sums, const at::Tensor& query,
                                 const OptionalScalar& scale) {
  check_query_sums(query, sums);
  check_scale(query, scale);
  const c10::cuda::CUDAGuard guard(query.device());
  if (!adds_up(query)) {
    return round_sums(sums, query);
  }
  at::Tensor grad_query = at::empty(query.sizes(), query.options());
  round_into(grad_query, scale_of(query, scale), sums_data(sums));
  return grad_query;
}

}  // namespace
}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, CUDA, m) {
  using namespace dilated::ops;
  m.impl("attention", &attention_with<forward_cuda>);
  m.impl("attention_backward", &attention_backward_with<backward_cuda>);
  m.impl("attention_block", &attention_block_with<forward_cuda>);
  m.impl("attention_block_backward", &attention_block_backward_with<backward_cuda>);
  m.impl("attention_block_backward_into", &attention_block_backward_into_with<backward_into_cuda>);
  m.impl("round_query_sums", &round_query_sums_cuda);
}

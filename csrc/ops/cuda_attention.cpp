// CUDA entry points of the attention operators: copy the pattern to the device, allocate, launch.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/choose.h"
#include "kernels/cuda/device.h"
#include "ops/attention_kernels.h"
#include "ops/checked_patterns.h"
#include "ops/cuda_capture.h"
#include "ops/planned_patterns.h"
#include "ops/query_sums.h"

namespace dilated::ops {
namespace {

/// A stream for copies alone, which nobody captures.
c10::cuda::CUDAStream copying_stream(c10::DeviceIndex device) {
  static std::mutex mutex;
  static auto& streams = *new std::map<c10::DeviceIndex, cudaStream_t>;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaStream_t& stream = streams[device];
  if (stream == nullptr) {
    C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
  return c10::cuda::getStreamFromExternal(stream, device);
}

/// Copies the words on a stream of their own and waits for the copy, which no queued work delays.
/// They are then ready for all streams.
at::Tensor keep_on_device(std::vector<int32_t>&& words, const at::Device& device) {
  // Otherwise another thread's capture would forbid waiting.
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  const c10::cuda::CUDAStream stream = copying_stream(device.index());
  const c10::cuda::CUDAStreamGuard guard(stream);
  at::Tensor copy = at::empty({static_cast<int64_t>(words.size())},
                              at::TensorOptions().dtype(at::kInt).device(device));
  C10_CUDA_CHECK(cudaMemcpyAsync(copy.mutable_data_ptr(), words.data(), copy.nbytes(),
                                 cudaMemcpyHostToDevice, stream));
  stream.synchronize();
  return copy;
}

/// Compares a pattern on the device with the call; rows of the tiles that kernels are to be for.
/// Unless a cache vouches for it or an earlier call has read it, the host waits for the device. A
/// graph compares in every replay, as the words may have changed, and stops the device if they are
/// wrong.
RowTiles check_on_device(const at::Tensor& pattern, const PatternSpec& spec) {
  const auto* words = pattern.const_data_ptr<int32_t>();
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  std::optional<PlannedFor> planned = checked_patterns().find(pattern);
  if (is_capturing()) {
    if (planned.has_value()) {
      check_planned_for(*planned, spec);
    }
    // The kernels of tall tiles take short ones as well.
    const RowTiles row_tiles =
        planned.has_value() ? planned->row_tiles : RowTiles{int32_t{kRowTile}, int32_t{kRowTile}};
    C10_CUDA_CHECK(kernels::cuda::require_pattern(
        words, pattern.numel(),
        {fingerprint(spec), static_cast<int32_t>(spec.directions), row_tiles}, stream));
    return row_tiles;
  }
  if (!planned.has_value()) {
    const at::Tensor found = at::empty({5}, pattern.options().dtype(at::kLong));
    C10_CUDA_CHECK(kernels::cuda::read_pattern(words, pattern.numel(),
                                               found.mutable_data_ptr<int64_t>(), stream));
    const at::Tensor answer = found.cpu();
    const auto* numbers = answer.const_data_ptr<int64_t>();
    check_planned(numbers[0] == 1);
    planned = {static_cast<uint64_t>(numbers[1]),
               static_cast<int32_t>(numbers[2]),
               {static_cast<int32_t>(numbers[3]), static_cast<int32_t>(numbers[4])}};
    checked_patterns().insert(pattern, *planned);
  }
  check_planned_for(*planned, spec);
  return planned->row_tiles;
}

/// The pattern on query's device, the caller's or the operators' own; keeps alive what args.pattern
/// points to.
LentPattern place_pattern(const AttentionCall& call, Directions reads,
                          kernels::AttentionArgs& args) {
  LentPattern lent{};
  if (call.pattern.has_value()) {
    const PatternSpec spec = spec_of(call, reads);
    lent.words = *call.pattern;
    check_contents(lent.words, spec);
    lent.row_tiles = check_on_device(lent.words, spec);
  } else {
    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
    lent = planned_patterns().lend(call, reads, {&keep_on_device, stream.unwrap(), is_capturing()});
  }
  args.pattern = lent.words.const_data_ptr<int32_t>();
  args.dropout.seed = call.dropout_p > 0.0 ? call.dropout_seed->const_data_ptr<int64_t>() : nullptr;
  return lent;
}

/// The call's device. DILATED_SHARED_MEMORY_BYTES lowers a block's shared memory, to run what
/// smaller GPUs run.
kernels::cuda::Device gpu_of(const at::Tensor& query) {
  static const size_t allowed = [] {
    const char* text = std::getenv("DILATED_SHARED_MEMORY_BYTES");
    const auto bytes = text == nullptr ? std::numeric_limits<size_t>::max()
                                       : kernels::cuda::parse_shared_bytes(text);
    TORCH_CHECK_VALUE(bytes.has_value(),
                      "DILATED_SHARED_MEMORY_BYTES: must be a number of bytes, at least ",
                      kernels::cuda::kLeastSharedBytes, ", got \"", text, "\"");
    return *bytes;
  }();
  kernels::cuda::Device device{};
  C10_CUDA_CHECK(kernels::cuda::find_device(query.device().index(), device));
  device.shared_bytes = std::min(device.shared_bytes, allowed);
  return device;
}

kernels::cuda::Problem problem_of(const at::Tensor& query, bool is_causal, int32_t row_tile) {
  return {dtype_of(query), query.size(3), is_causal, at::globalContext().deterministicAlgorithms(),
          row_tile};
}

/// Whether tensor maps, whose strides are below 2^40 bytes, can describe `entries` rows of `heads`
/// heads at any stride that a choice lists. They hold no stride of 0, as expanded tensors have.
bool is_mappable(const kernels::Rows& rows, int64_t batches, int64_t entries, int64_t heads) {
  constexpr int64_t kLongest = int64_t{1} << 39;
  const auto fits = [](int64_t count, int64_t stride, int64_t bytes_each) {
    return count <= 1 || (stride > 0 && stride < kLongest / bytes_each);
  };
  const auto& [batch, row, head] = rows.strides;
  constexpr int64_t kBytes = 2;
  return rows.is_aligned && fits(batches, batch, kBytes) && fits(heads, head, kBytes) &&
         fits(entries, row, kBytes * kernels::cuda::ListStrides::kLongest);
}

bool is_mappable(const kernels::ForwardArgs& args) {
  const auto are_mappable = [&](const kernels::Rows& keys, int64_t rows) {
    return is_mappable(keys, args.batch, rows, args.kv_heads);
  };
  const bool are_far_mappable =
      args.far_key.data == nullptr ||
      (are_mappable(args.far_key, args.far_keys) && are_mappable(args.far_value, args.far_keys));
  return args.query.is_aligned && args.out.is_aligned &&
         (args.running_lse == nullptr || args.running_out.is_aligned) &&
         are_mappable(args.key, args.keys) && are_mappable(args.value, args.keys) &&
         are_far_mappable;
}

bool is_mappable(const kernels::BackwardArgs& args) {
  const auto are_mappable = [&](const kernels::Rows& queries) {
    return is_mappable(queries, args.batch, args.queries, args.heads);
  };
  return args.key.is_aligned && args.value.is_aligned && args.grad_key.is_aligned &&
         args.grad_value.is_aligned && are_mappable(args.query) && are_mappable(args.grad_out);
}

kernels::cuda::ForwardProblem forward_problem_of(const AttentionCall& call,
                                                 const kernels::ForwardArgs& args,
                                                 int32_t row_tile) {
  return {problem_of(call.query, call.is_causal, row_tile), args.batch * args.heads * args.queries,
          is_mappable(args), call.dilation_rates, args.far_key.data != nullptr};
}

kernels::cuda::BackwardChoice choose_backward(const AttentionCall& call,
                                              const kernels::BackwardArgs& args, int32_t row_tile) {
  return kernels::cuda::choose_backward(
      {problem_of(call.query, call.is_causal, row_tile), is_mappable(args), call.dilation_rates},
      gpu_of(call.query));
}

/// Of any call: whether, and how, it adds grad_query up.
kernels::cuda::BackwardChoice choose_sums(const at::Tensor& query) {
  return kernels::cuda::choose_backward(
      {problem_of(query, /*is_causal=*/false, int32_t{kRowTile}), /*is_mappable=*/false, {}},
      gpu_of(query));
}

constexpr int64_t kCounterBytes = 256;  // in front of the sums, which are to be aligned

/// Zeros: the counter, if there is one, and `sums` numbers.
at::Tensor make_workspace(const at::Tensor& query, bool has_counter, int64_t sums) {
  const int64_t bytes =
      (has_counter ? kCounterBytes : 0) + sums * static_cast<int64_t>(sizeof(float));
  at::Tensor workspace = at::empty({bytes}, query.options().dtype(at::kByte));
  if (bytes > 0) {
    C10_CUDA_CHECK(cudaMemsetAsync(workspace.mutable_data_ptr(), 0, static_cast<size_t>(bytes),
                                   c10::cuda::getCurrentCUDAStream()));
  }
  return workspace;
}

unsigned long long* counter_of(const at::Tensor& workspace) {
  return static_cast<unsigned long long*>(workspace.mutable_data_ptr());
}

Results forward_cuda(const AttentionCall& call) {
  check_call(call);
  const c10::cuda::CUDAGuard guard(call.query.device());
  ForwardTensors forward = prepare_forward(call);
  const LentPattern pattern = place_pattern(call, Directions::kForward, forward.args);
  if (call.query.numel() > 0) {
    const kernels::cuda::ForwardChoice choice = kernels::cuda::choose_forward(
        forward_problem_of(call, forward.args, pattern.row_tiles.forward), gpu_of(call.query));
    const at::Tensor workspace = make_workspace(call.query, choice.has_counter, 0);
    C10_CUDA_CHECK(kernels::cuda::attention_forward(choice, forward.args, counter_of(workspace),
                                                    c10::cuda::getCurrentCUDAStream()));
  }
  return {forward.out, forward.lse};
}

/// By a pattern that is placed: writes the gradients, or adds grad_query to `sums`; workspace holds
/// the counter.
void run_backward(const AttentionCall& call, BackwardTensors& backward,
                  const kernels::cuda::BackwardChoice& choice, float* sums,
                  const at::Tensor& workspace) {
  if (call.query.numel() == 0 && call.key.numel() == 0) {
    return;
  }
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  const float* grad_lse_data =
      backward.grad_lse.defined() ? backward.grad_lse.const_data_ptr<float>() : nullptr;
  C10_CUDA_CHECK(kernels::cuda::attention_delta(backward.args, rows_of(backward.out), grad_lse_data,
                                                backward.delta.mutable_data_ptr<float>(), stream));
  C10_CUDA_CHECK(kernels::cuda::attention_backward(choice, backward.args,
                                                   {sums, counter_of(workspace)}, stream));
}

void round_into(const at::Tensor& grad_query, double scale, const float* sums) {
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
  BackwardTensors backward = prepare_backward(call, inputs);
  const LentPattern pattern = place_pattern(call, Directions::kBoth, backward.args);
  const kernels::cuda::BackwardChoice choice =
      choose_backward(call, backward.args, pattern.row_tiles.transposed);
  const bool has_sums = choice.sums_width > 0;
  const at::Tensor workspace =
      make_workspace(query, choice.max_blocks > 0,
                     query.size(0) * query.size(1) * query.size(2) * choice.sums_width);
  float* sums = has_sums ? reinterpret_cast<float*>(
                               static_cast<char*>(workspace.mutable_data_ptr()) + kCounterBytes)
                         : nullptr;
  run_backward(call, backward, choice, sums, workspace);
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
  if (choose_sums(call.query).sums_width == 0) {
    const auto [grad_query, grad_key, grad_value] = backward_cuda(call, inputs);
    add_to_sums(sums, grad_query);
    return {grad_key, grad_value};
  }
  check_backward(call, inputs);
  BackwardTensors backward = prepare_backward(call, inputs, /*with_grad_query=*/false);
  const LentPattern pattern = place_pattern(call, Directions::kBoth, backward.args);
  const kernels::cuda::BackwardChoice choice =
      choose_backward(call, backward.args, pattern.row_tiles.transposed);
  run_backward(call, backward, choice, sums_data(sums),
               make_workspace(call.query, choice.max_blocks > 0, 0));
  return {backward.grad_key, backward.grad_value};
}

at::Tensor round_query_sums_cuda(const at::Tensor& sums, const at::Tensor& query,
                                 const std::optional<at::Scalar>& given_scale) {
  const std::optional<double> scale = scale_number(given_scale);
  check_query_sums(query, sums);
  check_scale(query, scale);
  const c10::cuda::CUDAGuard guard(query.device());
  const kernels::cuda::BackwardChoice choice = choose_sums(query);
  if (choice.sums_width == 0) {
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
  register_device<forward_cuda, backward_cuda, backward_into_cuda>(m);
  m.impl("round_query_sums", &round_query_sums_cuda);
}

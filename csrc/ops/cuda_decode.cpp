// CUDA entry points of decode_attend, decode_append and decode_step: choose, allocate, launch. A
// graph may capture them: what a replay needs of the present lies on the device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "kernels/cuda/decode/decode.h"
#include "kernels/cuda/device.h"
#include "ops/decode.h"

namespace dilated::ops {
namespace {

namespace decode = kernels::cuda::decode;

decode::Choice choose(const kernels::DecodeStepArgs& args, const at::Device& device) {
  kernels::cuda::Device found{};
  C10_CUDA_CHECK(kernels::cuda::find_device(device.index(), found));
  const bool is_aligned =
      args.query.is_aligned && args.key.is_aligned && args.value.is_aligned &&
      (!args.appends() || (args.new_key.is_aligned && args.new_value.is_aligned));
  return decode::choose({args.dtype, args.head_dim, is_aligned, args.batch * args.queries,
                         args.heads, args.kv_heads, decode::most_rows(args)},
                        found);
}

kernels::DecodeStepArgs args_of(const AttendCall& call) {
  kernels::DecodeStepArgs args{};
  static_cast<kernels::DecodeAttendArgs&>(args) = call.args;
  return args;
}

void launch(const AttendCall& call, const kernels::DecodeStepArgs& args) {
  if (args.batch == 0 || args.queries == 0) {
    return;
  }
  const decode::Choice choice = choose(args, call.query.device());
  const at::Tensor workspace =
      at::empty({decode::workspace_size(args, choice)}, call.query.options().dtype(at::kFloat));
  C10_CUDA_CHECK(decode::step(args, choice, workspace.mutable_data_ptr<float>(),
                              c10::cuda::getCurrentCUDAStream()));
}

std::tuple<at::Tensor, at::Tensor> attend_cuda(const at::Tensor& query, const at::Tensor& key,
                                               const at::Tensor& value, const at::Tensor& lengths,
                                               const at::Tensor& lattices,
                                               at::IntArrayRef segment_lengths,
                                               at::IntArrayRef dilation_rates, int64_t kv_heads,
                                               const OptionalTensor& counts,
                                               std::optional<double> scale) {
  const c10::cuda::CUDAGuard guard(query.device());
  const AttendCall call =
      prepare_attend(query, key, value,
                     {lengths, lattices, segment_lengths, dilation_rates, counts}, kv_heads, scale);
  launch(call, args_of(call));
  return {call.out, call.lse};
}

void append_cuda(at::Tensor& key_rows, at::Tensor& value_rows, at::Tensor& lengths,
                 const at::Tensor& key, const at::Tensor& value, const at::Tensor& lattices,
                 at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
                 const OptionalTensor& counts, std::optional<int64_t> max_seq_len) {
  const c10::cuda::CUDAGuard guard(key.device());
  const AppendCall call =
      prepare_append(key_rows, value_rows, key, value,
                     {lengths, lattices, segment_lengths, dilation_rates, counts}, max_seq_len);
  C10_CUDA_CHECK(decode::append(call.args, c10::cuda::getCurrentCUDAStream()));
}

/// One position in one go, more of them one after the other.
std::tuple<at::Tensor, at::Tensor> step_cuda(
    at::Tensor& key_rows, at::Tensor& value_rows, at::Tensor& lengths, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& lattices,
    at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates, const OptionalTensor& counts,
    std::optional<double> scale, std::optional<int64_t> max_seq_len) {
  const c10::cuda::CUDAGuard guard(query.device());
  const DecodeCall call{lengths, lattices, segment_lengths, dilation_rates, counts};
  check_step(key_rows, value_rows, query, key, value, call, scale);
  const AppendCall append = prepare_append(key_rows, value_rows, key, value, call, max_seq_len);
  if (key.size(1) != 1) {
    C10_CUDA_CHECK(decode::append(append.args, c10::cuda::getCurrentCUDAStream()));
  }
  const AttendCall attend = prepare_attend(query, key_rows, value_rows, call, key.size(2), scale);
  kernels::DecodeStepArgs args = args_of(attend);
  if (key.size(1) == 1) {
    args.new_key = append.args.key;
    args.new_value = append.args.value;
    args.key_rows = append.args.key_rows;
    args.value_rows = append.args.value_rows;
    args.lengths_after = append.args.lengths_after;
    args.max_seq_len = append.args.max_seq_len;
  }
  launch(attend, args);
  return {attend.out, attend.lse};
}

}  // namespace
}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, CUDA, m) {
  m.impl("decode_attend", &dilated::ops::attend_cuda);
  m.impl("decode_append", &dilated::ops::append_cuda);
  m.impl("decode_step", &dilated::ops::step_cuda);
}

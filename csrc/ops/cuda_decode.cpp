// CUDA entry points of decode_attend and decode_append: choose, allocate, launch. A graph may
// capture them: what a replay needs of the present lies on the device.
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

decode::Choice choose(const kernels::DecodeAttendArgs& args, const at::Device& device) {
  kernels::cuda::Device found{};
  C10_CUDA_CHECK(kernels::cuda::find_device(device.index(), found));
  const bool is_aligned = args.query.is_aligned && args.key.is_aligned && args.value.is_aligned;
  return decode::choose({args.dtype, args.head_dim, is_aligned, args.batch * args.queries,
                         args.heads, args.kv_heads, decode::most_rows(args)},
                        found);
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
  const decode::Choice choice = choose(call.args, query.device());
  const at::Tensor workspace =
      at::empty({decode::workspace_size(call.args, choice)}, query.options().dtype(at::kFloat));
  C10_CUDA_CHECK(decode::attend(call.args, choice, workspace.mutable_data_ptr<float>(),
                                c10::cuda::getCurrentCUDAStream()));
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

}  // namespace
}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, CUDA, m) {
  m.impl("decode_attend", &dilated::ops::attend_cuda);
  m.impl("decode_append", &dilated::ops::append_cuda);
}

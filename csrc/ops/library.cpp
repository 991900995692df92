// The schemas of torch.ops.dilated.
#include <dilated/build.h>
#include <torch/library.h>

#include <vector>

#include "dilated_build_config.h"

namespace dilated {

const char* torch_version_built() noexcept { return DILATED_TORCH_VERSION; }

bool built_with_cuda() noexcept {
#ifdef DILATED_WITH_CUDA
  return true;
#else
  return false;
#endif
}

TORCH_LIBRARY(dilated, m) {
  m.set_python_module("dilated_attention_pytorch");
  // torch.compile plans in every call, on the host, which the replay of a CUDA graph would not do:
  // with mode="reduce-overhead" these run between the graphs.
  const std::vector<at::Tag> plans{at::Tag::cudagraph_unsafe};
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, SymInt[] segment_lengths, "
      "int[] dilation_rates, *, Tensor? head_offsets=None, bool is_causal=False, "
      "Scalar? scale=None, str padding=\"masked\", float dropout_p=0.0, "
      "Tensor? dropout_seed=None, Tensor? pattern=None) -> (Tensor out, Tensor lse)",
      plans);
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
      "Tensor value, Tensor out, Tensor lse, SymInt[] segment_lengths, int[] dilation_rates, *, "
      "Tensor? head_offsets=None, bool is_causal=False, Scalar? scale=None, "
      "str padding=\"masked\", float dropout_p=0.0, Tensor? dropout_seed=None, "
      "Tensor? pattern=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
      plans);
  m.def(
      "attention_block(Tensor query, Tensor key, Tensor value, int seq_len, int query_begin, "
      "int key_begin, SymInt[] segment_lengths, int[] dilation_rates, *, Tensor? out=None, "
      "Tensor? lse=None, Tensor? head_offsets=None, bool is_causal=False, Scalar? scale=None, "
      "str padding=\"masked\", float dropout_p=0.0, Tensor? dropout_seed=None, "
      "Tensor? pattern=None, bool partial=False) -> (Tensor out, Tensor lse)",
      plans);
  m.def(
      "attention_block_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
      "Tensor value, Tensor out, Tensor lse, int seq_len, int query_begin, int key_begin, "
      "SymInt[] segment_lengths, int[] dilation_rates, *, Tensor? head_offsets=None, "
      "bool is_causal=False, Scalar? scale=None, str padding=\"masked\", float dropout_p=0.0, "
      "Tensor? dropout_seed=None, Tensor? pattern=None, bool partial=False) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
      plans);
  m.def(
      "attention_block_backward_into(Tensor(a!) grad_query_sums, Tensor grad_out, "
      "Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "int seq_len, int query_begin, int key_begin, SymInt[] segment_lengths, int[] "
      "dilation_rates, "
      "*, Tensor? head_offsets=None, bool is_causal=False, Scalar? scale=None, "
      "str padding=\"masked\", float dropout_p=0.0, Tensor? dropout_seed=None, "
      "Tensor? pattern=None) -> (Tensor grad_key, Tensor grad_value)",
      plans);
  m.def(
      "round_query_sums(Tensor grad_query_sums, Tensor query, *, Scalar? scale=None) "
      "-> Tensor grad_query");
  m.def(
      "ring_attention(Tensor query, Tensor key, Tensor value, SymInt[] segment_lengths, "
      "int[] dilation_rates, str group_name, *, Tensor? head_offsets=None, bool is_causal=False, "
      "Scalar? scale=None, str padding=\"masked\", float dropout_p=0.0, "
      "Tensor? dropout_seed=None, SymInt[]? shard_lengths=None, str strategy=\"auto\") "
      "-> (Tensor out, Tensor lse)",
      plans);
  m.def(
      "ring_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
      "Tensor value, Tensor out, Tensor lse, SymInt[] segment_lengths, int[] dilation_rates, "
      "str group_name, *, Tensor? head_offsets=None, bool is_causal=False, Scalar? scale=None, "
      "str padding=\"masked\", float dropout_p=0.0, Tensor? dropout_seed=None, "
      "SymInt[]? shard_lengths=None, str strategy=\"auto\") "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
      plans);
  m.def(
      "segment_attention(Tensor query, Tensor key, Tensor value, SymInt segment_length, "
      "int dilation_rate, *, Tensor? head_offsets=None, bool is_causal=False, "
      "Scalar? scale=None, str padding=\"masked\", float dropout_p=0.0, "
      "Tensor? dropout_seed=None, Tensor? pattern=None) -> (Tensor out, Tensor lse)",
      plans);
  m.def(
      "gather(Tensor input, SymInt segment_length, int dilation_rate, *, "
      "Tensor? head_offsets=None, int start=0) -> Tensor");
  m.def(
      "scatter_add(Tensor input, Tensor packed, SymInt segment_length, int dilation_rate, *, "
      "Tensor? head_offsets=None, int start=0) -> Tensor");
  m.def(
      "gather_into(Tensor(a!) packed, Tensor input, SymInt segment_length, int dilation_rate, *, "
      "Tensor? head_offsets=None, int start=0) -> ()");
  m.def(
      "scatter_into(Tensor(a!) rows, Tensor packed, SymInt segment_length, int dilation_rate, *, "
      "Tensor? head_offsets=None, int start=0, bool accumulate=False) -> ()");
  m.def("vouch(Tensor copy, Tensor pattern) -> ()");
}

#ifndef DILATED_WITH_CUDA
namespace {

void refuse_cuda(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.schema().name(),
      ": tensors must be on the CPU, got a CUDA tensor: this build has no CUDA kernels, since no "
      "nvcc was found or DILATED_WITH_CUDA was OFF. Install again where nvcc is on the PATH");
}

}  // namespace

TORCH_LIBRARY_IMPL(dilated, CUDA, m) {
  for (const char* name :
       {"attention", "attention_backward", "attention_block", "attention_block_backward",
        "attention_block_backward_into", "round_query_sums", "gather", "scatter_add", "gather_into",
        "scatter_into"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  }
}
#endif

}  // namespace dilated

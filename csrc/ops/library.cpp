// The schemas of torch.ops.dilated.
#include <dilated/build.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "dilated_build_config.h"
#include "kernels/cpu/attention.h"
#include "ops/attention_call.h"

namespace dilated {

const char* torch_version_built() noexcept { return DILATED_TORCH_VERSION; }

bool built_with_cuda() noexcept {
#ifdef DILATED_WITH_CUDA
  return true;
#else
  return false;
#endif
}

const char* cpu_instruction_set() noexcept {
  using kernels::cpu::Isa;
  return supports(Isa::kAvx512) ? "avx512" : supports(Isa::kAvx2) ? "avx2" : "baseline";
}

TORCH_LIBRARY(dilated, m) {
  using namespace ops;
  m.set_python_module("dilated_attention_pytorch");
  // A compiled call of a new length has to plan, on the host, which the replay of a CUDA graph
  // would not do: with mode="reduce-overhead" these run between the graphs.
  const std::vector<at::Tag> plans{at::Tag::cudagraph_unsafe};
  const auto attend = [&](const std::string& schema) { m.def(schema.c_str(), plans); };
  const std::string rows = "Tensor query, Tensor key, Tensor value";
  const std::string all_rows =
      "Tensor grad_out, Tensor? grad_lse, " + rows + ", Tensor out, Tensor lse";
  const std::string branches = ", SymInt[] segment_lengths, int[] dilation_rates";
  const std::string block = ", int seq_len, int[1] queries, int[1] keys" + branches;
  const std::string options = ", " + std::string(kOptionsText);
  const std::string planned = options + ", Tensor? pattern=None";
  const std::string ring = branches + ", str group_name, *" + options +
                           ", SymInt[]? shard_lengths=None, str strategy=\"auto\", "
                           "str shard_layout=\"contiguous\"";
  const std::string results = ") -> (Tensor out, Tensor lse)";
  const std::string gradients = ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)";
  attend("attention(" + rows + branches + ", *" + planned + results);
  attend("attention_backward(" + all_rows + branches + ", *" + planned + gradients);
  attend("attention_block(" + rows + block + ", *, Tensor? out=None, Tensor? lse=None" + planned +
         ", bool partial=False" + results);
  attend("attention_block_into(Tensor(a!) out, Tensor(b!) lse, " + rows +
         ", Tensor? far_key, Tensor? far_value, int seq_len, int[1] queries, int[1] keys, "
         "int[1] far_keys" +
         branches + ", *, str rows=\"all\"" + planned + ") -> ()");
  attend("attention_block_backward(" + all_rows + block + ", *" + planned + ", bool partial=False" +
         gradients);
  attend("attention_block_backward_into(Tensor(a!) grad_query_sums, " + all_rows + block + ", *" +
         planned + ") -> (Tensor grad_key, Tensor grad_value)");
  attend("segment_attention(" + rows + ", SymInt segment_length, int dilation_rate, *" + planned +
         results);
  attend("ring_attention(" + rows + ring + results);
  attend("ring_attention_backward(" + all_rows + ring + gradients);
  m.def("make_query_sums(Tensor query) -> Tensor grad_query_sums");
  m.def(
      "round_query_sums(Tensor grad_query_sums, Tensor query, *, Scalar? scale=None) "
      "-> Tensor grad_query");
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
  const std::string lattices = "Tensor lattices, int[] segment_lengths, int[] dilation_rates";
  const std::string decode_attend = "decode_attend(" + rows + ", Tensor lengths, " + lattices +
                                    ", int kv_heads, *, Tensor? counts=None, float? scale=None";
  m.def((decode_attend + results).c_str());
  const std::string appended = "(Tensor(a!) key_rows, Tensor(b!) value_rows, Tensor(c!) lengths, ";
  m.def(("decode_append" + appended + "Tensor key, Tensor value, " + lattices +
         ", *, Tensor? counts=None, int? max_seq_len=None) -> ()")
            .c_str());
  m.def(("decode_step" + appended + rows + ", " + lattices +
         ", *, Tensor? counts=None, float? scale=None, int? max_seq_len=None" + results)
            .c_str());
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
       {"attention", "attention_backward", "attention_block", "attention_block_into",
        "attention_block_backward", "attention_block_backward_into", "round_query_sums",
        "decode_attend", "decode_append", "decode_step", "gather", "scatter_add", "gather_into",
        "scatter_into"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  }
}
#endif

}  // namespace dilated

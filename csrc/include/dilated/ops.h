// The operators for LibTorch programs: what torch.ops.dilated offers, through the same dispatcher,
// with gradients.
//
// Tensors are [batch, seq_len, heads, head_dim] of float16, bfloat16, float32 or (on the CPU)
// float64. Bad arguments throw c10::ValueError, a c10::Error that names the argument, what must
// hold and what was given.
#pragma once

#include <ATen/core/Tensor.h>
#include <dilated/export.h>

#include <optional>
#include <string>
#include <tuple>

namespace dilated {

/// What every attention operator takes beside its tensors and branches.
struct AttentionOptions {
  std::optional<at::Tensor>
      head_offsets;  // int64 [branches, heads] on the CPU; -1: head not in the branch
  bool is_causal = false;
  std::optional<double> scale;     // default: 1 / sqrt(head_dim)
  std::string padding = "masked";  // or "zeros", torchscale's
  double dropout_p = 0.0;
  std::optional<at::Tensor> dropout_seed;  // int64 [1] on query's device; needed when dropout_p > 0
  std::optional<at::Tensor>
      pattern;  // int32 from plan(), on query's device; planned on the spot by default
};

/// Dilated attention (LongNet, arXiv 2307.02486, eqs. 3-10): one softmax over the union of the
/// branches' keys. query [B, N, H, D], key and value [B, N, Hkv, D] with Hkv dividing H. Returns
/// out like query and the logarithm of the softmax's denominator, [B, H, N]; a row that attends to
/// nothing has out = 0 and lse = -inf.
DILATED_API std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& query,
                                                         const at::Tensor& key,
                                                         const at::Tensor& value,
                                                         at::IntArrayRef segment_lengths,
                                                         at::IntArrayRef dilation_rates,
                                                         const AttentionOptions& options = {});

/// The same with a single branch.
DILATED_API std::tuple<at::Tensor, at::Tensor> segment_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t segment_length,
    int64_t dilation_rate, const AttentionOptions& options = {});

/// A branch's rows, packed: [B, N, H, D] -> [B, M, H, D], where row n of the input has sequence
/// position start + n. The stretch is cut at the segments' ends; a piece of length len gives
/// ceil(len / r) slots, in which head h finds its positions of the lattice, then zeros.
/// head_offsets is int64 [H] on the CPU; by default h mod r.
DILATED_API at::Tensor gather(const at::Tensor& input, int64_t segment_length,
                              int64_t dilation_rate,
                              const std::optional<at::Tensor>& head_offsets = std::nullopt,
                              int64_t start = 0);

/// input + the transpose of gather applied to packed.
DILATED_API at::Tensor scatter_add(const at::Tensor& input, const at::Tensor& packed,
                                   int64_t segment_length, int64_t dilation_rate,
                                   const std::optional<at::Tensor>& head_offsets = std::nullopt,
                                   int64_t start = 0);

}  // namespace dilated

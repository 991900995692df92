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
#include <vector>

namespace dilated {

/// What every attention operator takes beside its tensors and branches.
struct AttentionOptions {
  std::optional<at::Tensor>
      head_offsets;  // int64 [branches, heads] on the CPU; -1: head not in the branch
  bool is_causal = false;
  std::optional<double> scale;     // finite in the type of lse; default: 1 / sqrt(head_dim)
  std::string padding = "masked";  // or "zeros", torchscale's
  double dropout_p = 0.0;
  std::optional<at::Tensor> dropout_seed;  // int64 [1] on query's device; needed when dropout_p > 0
  // int64 [sequences, 2] on the CPU, of (first row, length), ascending and without overlap: query,
  // key and value are then [1, rows, heads, head_dim], and each sequence is as if called alone,
  // with the dropout of the batch entry of its index. Rows between them may hold anything; they get
  // out = 0, lse = -inf and gradients of 0. A block's positions count through the whole batch's
  // rows.
  std::optional<at::Tensor> sequences;
  std::optional<at::Tensor>
      pattern;  // int32 from plan(), on query's device; planned on the spot by default
};

/// Dilated attention (LongNet, arXiv 2307.02486, eqs. 3-10): one softmax over the union of the
/// branches' keys. query [B, N, H, D], key and value [B, N, Hkv, D] with Hkv dividing H. Returns
/// out, like query, and lse, the logarithm of the softmax's denominator, [B, H, N]; a row that
/// attends to nothing has out = 0 and lse = -inf.
DILATED_API std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& query,
                                                         const at::Tensor& key,
                                                         const at::Tensor& value,
                                                         at::IntArrayRef segment_lengths,
                                                         at::IntArrayRef dilation_rates,
                                                         const AttentionOptions& options = {});

/// Where a block lies in a sequence of seq_len: the positions of the rows of query, and of those of
/// key and value, as stretches begin, end, begin, end, ... in the sequence's order. The last end
/// may be left out: rows are as many as there are.
struct AttentionBlock {
  int64_t seq_len = 0;
  std::vector<int64_t> queries{0}, keys{0};
  // The running result that is continued; both or neither.
  std::optional<at::Tensor> out = std::nullopt, lse = std::nullopt;
  bool partial = false;  // results in float32 (float64 for float64) instead of query's dtype
};

/// Attention of query [B, Nq, H, D] over the keys of one block, key and value [B, Nk, Hkv, D]. With
/// a running result (out and lse as this function returns them with partial = true) the softmax is
/// over its keys and these, so that all blocks together, in any order, are attention(). padding =
/// "zeros" counts a row's zero keys in the block that holds the row's own position. Rows of key and
/// value that no query would meet even without is_causal may hold anything. Not differentiable:
/// call attention_block_backward() yourself.
DILATED_API std::tuple<at::Tensor, at::Tensor> attention_block(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const AttentionBlock& block, at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
    const AttentionOptions& options = {});

/// More keys of a block, [B, Nf, Hkv, D] in tensors of their own, at other positions than its keys,
/// and which rows to compute: "all", "near" (those that meet none of these) or "far" (the others).
struct FarKeys {
  std::optional<at::Tensor> key, value;  // needed unless rows are the near ones
  std::vector<int64_t> keys{};           // as AttentionBlock::keys
  std::string rows = "all";
};

/// As attention_block(), over near and far keys at once: writes the rows of out [B, Nq, H, D] and
/// lse [B, H, Nq] that are asked for, and none that lies in no sequence. Their gradients are those
/// of the blocks of near and of far keys. block.out and block.lse must not be given, and its
/// results are not partial.
DILATED_API void attention_block_into(const at::Tensor& out, const at::Tensor& lse,
                                      const at::Tensor& query, const at::Tensor& key,
                                      const at::Tensor& value, const FarKeys& far,
                                      const AttentionBlock& block, at::IntArrayRef segment_lengths,
                                      at::IntArrayRef dilation_rates,
                                      const AttentionOptions& options = {});

/// One block's share of the gradients of query, key and value; the gradients are the sums over all
/// blocks. out (in query's dtype), lse and their gradients are the final ones, of all blocks.
/// block.out and block.lse must not be given.
DILATED_API std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_block_backward(
    const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
    const AttentionBlock& block, at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
    const AttentionOptions& options = {});

/// The same as attention() with a single branch.
DILATED_API std::tuple<at::Tensor, at::Tensor> segment_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t segment_length,
    int64_t dilation_rate, const AttentionOptions& options = {});

/// A branch's rows, packed: [B, N, H, D] -> [B, M, H, D], where row n of the input has sequence
/// position start + n. The stretch is cut at the segments' ends; a piece of length len gives
/// ceil(len / r) slots, which hold head h's positions on its lattice, then zeros.
/// head_offsets is int64 [H] on the CPU; by default h mod r. start + N < 2^31.
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

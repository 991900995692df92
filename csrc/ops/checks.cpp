#include "ops/checks.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace dilated::ops {
namespace {

void check_rank(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.dim() == 4, name, ": must be [batch, seq_len, heads, head_dim], got ",
                    tensor.dim(), " dimensions ", tensor.sym_sizes());
}

/// A block's keys have a length of their own.
void check_like_query(const AttentionCall& call, const at::Tensor& tensor, const char* name) {
  const at::Tensor& query = call.query;
  check_rank(tensor, name);
  TORCH_CHECK_VALUE(tensor.scalar_type() == query.scalar_type(), name,
                    ": must have the dtype of query, ", query.scalar_type(), ", got ",
                    tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == query.device(), name, ": must be on the device of query, ",
                    query.device(), ", got ", tensor.device());
  TORCH_CHECK_VALUE(tensor.sym_size(0) == query.sym_size(0) &&
                        (call.block.has_value() || tensor.sym_size(1) == query.sym_size(1)),
                    name, ": must have the batch and seq_len of query, ", query.sym_sizes(),
                    ", got ", tensor.sym_sizes());
  TORCH_CHECK_VALUE(tensor.sym_size(3) == query.sym_size(3), name,
                    ": must have the head_dim of query, ", query.sym_size(3), ", got ",
                    tensor.sym_size(3));
}

void check_dropout(const AttentionCall& call) {
  TORCH_CHECK_VALUE(0.0 <= call.dropout_p && call.dropout_p < 1.0,
                    "dropout_p: 0 <= dropout_p < 1 must hold, got ", call.dropout_p);
  if (call.dropout_p == 0.0) {
    return;
  }
  TORCH_CHECK_VALUE(
      call.dropout_seed.has_value(),
      "dropout_seed: an int64 tensor of one number is needed when dropout_p > 0, got None");
  const at::Tensor& seed = *call.dropout_seed;
  TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.sym_numel() == 1,
                    "dropout_seed: must be an int64 tensor of one number, got ", seed.scalar_type(),
                    " ", seed.sym_sizes());
  TORCH_CHECK_VALUE(seed.device() == call.query.device(),
                    "dropout_seed: must be on the device of query, ", call.query.device(), ", got ",
                    seed.device());
}

Padding padding_of(std::string_view padding) {
  TORCH_CHECK_VALUE(padding == "masked" || padding == "zeros",
                    "padding: must be \"masked\" or \"zeros\", got \"", padding, "\"");
  return padding == "zeros" ? Padding::kZeros : Padding::kMasked;
}

void check_offsets(const AttentionCall& call) {
  if (!call.head_offsets.has_value()) {
    return;
  }
  const at::Tensor& table = *call.head_offsets;
  const auto branches = static_cast<int64_t>(call.segment_lengths.size());
  const auto heads = call.query.sym_size(2);
  // A fake call's tensors are all on the meta device.
  TORCH_CHECK_VALUE(table.scalar_type() == at::kLong &&
                        (table.device().is_cpu() || call.query.device().is_meta()),
                    "head_offsets: must be an int64 tensor on the CPU, got ", table.scalar_type(),
                    " on ", table.device());
  TORCH_CHECK_VALUE(table.dim() == 2 && table.sym_size(0) == branches && table.sym_size(1) == heads,
                    "head_offsets: must be [branches, heads] = [", branches, ", ", heads, "], got ",
                    table.sym_sizes());
}

void check_words(const AttentionCall& call) {
  if (!call.pattern.has_value()) {
    return;
  }
  const at::Tensor& pattern = *call.pattern;
  TORCH_CHECK_VALUE(pattern.scalar_type() == at::kInt && pattern.dim() == 1,
                    "pattern: must be a one-dimensional int32 tensor, got ", pattern.scalar_type(),
                    " ", pattern.sym_sizes());
  TORCH_CHECK_VALUE(pattern.device() == call.query.device(),
                    "pattern: must be on the device of query, ", call.query.device(), ", got ",
                    pattern.device());
}

void check_range(int64_t begin, const at::Tensor& tensor, int64_t seq_len, const char* name) {
  TORCH_CHECK_VALUE(0 <= begin && begin <= seq_len && tensor.sym_size(1) <= seq_len - begin, name,
                    ": 0 <= ", name, " and ", name, " + rows <= seq_len must hold, got ", name, " ",
                    begin, ", rows ", tensor.sym_size(1), ", seq_len ", seq_len);
}

void check_block(const AttentionCall& call) {
  if (!call.block.has_value()) {
    return;
  }
  const AttentionBlock& block = *call.block;
  TORCH_CHECK_VALUE(block.seq_len >= 0, "seq_len: must not be negative, got ", block.seq_len);
  check_range(block.query_begin, call.query, block.seq_len, "query_begin");
  check_range(block.key_begin, call.key, block.seq_len, "key_begin");
  TORCH_CHECK_VALUE(block.out.has_value() == block.lse.has_value(),
                    "out and lse: both or neither of a running result must be given, got ",
                    block.out.has_value() ? "out" : "lse", " alone");
  if (block.out.has_value()) {
    const at::ScalarType dtype = lse_dtype(call.query);
    check_rows(call.query, *block.out, dtype, "out");
    check_row_sums(call.query, *block.lse, "lse");
    TORCH_CHECK_VALUE(block.lse->scalar_type() == dtype, "lse: must be ", dtype, ", got ",
                      block.lse->scalar_type());
  }
}

std::vector<int64_t> offsets_of(const AttentionCall& call, int64_t heads) {
  if (!call.head_offsets.has_value()) {
    return interleaved_offsets(call.dilation_rates.vec(), heads);
  }
  const at::Tensor rows = call.head_offsets->contiguous();
  return {rows.const_data_ptr<int64_t>(), rows.const_data_ptr<int64_t>() + rows.numel()};
}

}  // namespace

void check_call(const AttentionCall& call) {
  check_rank(call.query, "query");
  const auto dtype = call.query.scalar_type();
  const bool is_double = dtype == at::kDouble;
  TORCH_CHECK_VALUE(
      dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || is_double,
      "query: must be float16, bfloat16, float32 or float64, got ", dtype);
  TORCH_CHECK_VALUE(!is_double || !call.query.is_cuda(),
                    "query: float64 is supported on the CPU only, got float64 on ",
                    call.query.device());
  check_like_query(call, call.key, "key");
  check_like_query(call, call.value, "value");
  TORCH_CHECK_VALUE(call.value.sym_size(1) == call.key.sym_size(1),
                    "value: must have the seq_len of key, ", call.key.sym_size(1), ", got ",
                    call.value.sym_size(1));
  TORCH_CHECK_VALUE(call.value.sym_size(2) == call.key.sym_size(2),
                    "value: must have the heads of key, ", call.key.sym_size(2), ", got ",
                    call.value.sym_size(2));
  const auto heads = call.query.sym_size(2), kv_heads = call.key.sym_size(2);
  TORCH_CHECK_VALUE(heads > 0 && kv_heads > 0 && heads % kv_heads == 0,
                    "key: its heads must divide query's, got ", kv_heads, " for ", heads, " heads");
  TORCH_CHECK_VALUE(call.query.sym_size(3) >= 1 && call.query.sym_size(3) <= 256,
                    "query: 1 <= head_dim <= 256 must hold, got ", call.query.sym_size(3));
  padding_of(call.padding);
  check_block(call);
  check_dropout(call);
  check_offsets(call);
  check_words(call);
}

void check_branches(const AttentionCall& call) {
  PatternSpec spec;
  spec.seq_len = 1;
  spec.segment_lengths = call.segment_lengths.vec();
  spec.dilation_rates = call.dilation_rates.vec();
  spec.head_offsets.assign(spec.segment_lengths.size(), 0);
  try {
    validate(spec);
  } catch (const std::invalid_argument& error) {
    C10_THROW_ERROR(ValueError, error.what());
  }
}

void check_rows(const at::Tensor& query, const at::Tensor& tensor, at::ScalarType dtype,
                const char* name) {
  TORCH_CHECK_VALUE(tensor.sym_sizes() == query.sym_sizes() && tensor.scalar_type() == dtype &&
                        tensor.device() == query.device(),
                    name, ": must have the shape and device of query, ", query.sym_sizes(), " ",
                    query.device(), ", and be ", dtype, ", got ", tensor.sym_sizes(), " ",
                    tensor.device(), " ", tensor.scalar_type());
}

void check_row_sums(const at::Tensor& query, const at::Tensor& tensor, const char* name) {
  const std::array<c10::SymInt, 3> rows{query.sym_size(0), query.sym_size(2), query.sym_size(1)};
  TORCH_CHECK_VALUE(
      tensor.sym_sizes() == c10::SymIntArrayRef(rows) && tensor.device() == query.device(), name,
      ": must be [batch, heads, seq_len] = ", c10::SymIntArrayRef(rows), " on ", query.device(),
      ", got ", tensor.sym_sizes(), " on ", tensor.device());
}

void check_no_gradient(const char* op,
                       std::initializer_list<std::pair<const char*, const at::Tensor*>> tensors,
                       const char* instead) {
  if (!at::GradMode::is_enabled()) {
    return;
  }
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK(tensor == nullptr || !tensor->defined() || !tensor->requires_grad(), name,
                ": must not require gradients. ", op, ": not differentiable; ", instead);
  }
}

at::ScalarType lse_dtype(const at::Tensor& query) {
  return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::ScalarType result_dtype(const AttentionCall& call) {
  const bool is_partial = call.block.has_value() && call.block->partial;
  return is_partial ? lse_dtype(call.query) : call.query.scalar_type();
}

PatternSpec spec_of(const AttentionCall& call) {
  PatternSpec spec;
  spec.seq_len = call.query.size(1);
  spec.segment_lengths = call.segment_lengths.vec();
  spec.dilation_rates = call.dilation_rates.vec();
  spec.heads = call.query.size(2);
  spec.kv_heads = call.key.size(2);
  spec.is_causal = call.is_causal;
  spec.padding = padding_of(call.padding);
  if (call.block.has_value()) {
    const AttentionBlock& block = *call.block;
    spec.seq_len = block.seq_len;
    spec.queries = {block.query_begin, block.query_begin + call.query.size(1)};
    spec.keys = {block.key_begin, block.key_begin + call.key.size(1)};
  }
  try {
    spec.head_offsets = offsets_of(call, spec.heads);
    validate(spec);
  } catch (const std::invalid_argument& error) {
    C10_THROW_ERROR(ValueError, error.what());
  }
  return spec;
}

void check_aligned(const at::Tensor& tensor, const char* name) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  TORCH_CHECK_VALUE(address % 16 == 0, name, ": must begin at a multiple of 16 bytes, got ",
                    address);
}

kernels::Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return kernels::Dtype::kFloat16;
    case at::kBFloat16:
      return kernels::Dtype::kBFloat16;
    case at::kFloat:
      return kernels::Dtype::kFloat32;
    case at::kDouble:
      return kernels::Dtype::kFloat64;
    default:
      C10_THROW_ERROR(ValueError,
                      c10::str("dtype: must be float16, bfloat16, float32 or float64, got ",
                               tensor.scalar_type()));
  }
}

double scale_of(const at::Tensor& query, std::optional<double> scale) {
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(query.size(3))));
}

at::Tensor readable(const at::Tensor& tensor) {
  const bool is_readable = (tensor.stride(3) == 1 || tensor.size(3) == 1) &&
                           tensor.stride(1) <= std::numeric_limits<int32_t>::max();
  return is_readable ? tensor : tensor.contiguous();
}

kernels::Rows rows_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), {tensor.stride(0), tensor.stride(1), tensor.stride(2)}};
}

kernels::MutableRows mutable_rows_of(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), {tensor.stride(0), tensor.stride(1), tensor.stride(2)}};
}

}  // namespace dilated::ops

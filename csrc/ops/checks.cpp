#include "ops/checks.h"

#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/Formatting.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace dilated::ops {
namespace {

constexpr int64_t kMaxHeads = std::numeric_limits<uint16_t>::max();

void check_rank(const at::Tensor& tensor, const char* name) {
  check_tensor(tensor, name);
  TORCH_CHECK_VALUE(tensor.dim() == 4, name, ": must be [batch, seq_len, heads, head_dim], got ",
                    tensor.dim(), " dimensions ", tensor.sym_sizes());
}

void check_dropout(const AttentionCall& call) {
  TORCH_CHECK_VALUE(0.0 <= call.dropout_p && call.dropout_p < 1.0,
                    "dropout_p: must be at least 0 and below 1, got ", call.dropout_p);
  if (call.dropout_p == 0.0) {
    return;
  }
  TORCH_CHECK_VALUE(
      call.dropout_seed.has_value(),
      "dropout_seed: must be an int64 tensor of one number where dropout_p > 0, got None");
  const at::Tensor& seed = *call.dropout_seed;
  check_tensor(seed, "dropout_seed");
  TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.sym_numel() == 1,
                    "dropout_seed: must be an int64 tensor of one number, got ",
                    dtype_name(seed.scalar_type()), " ", seed.sym_sizes());
  TORCH_CHECK_VALUE(seed.device() == call.query.device(),
                    "dropout_seed: must be on the device of query, ", call.query.device(), ", got ",
                    seed.device());
}

Padding padding_of(std::string_view padding) {
  TORCH_CHECK_VALUE(padding == "masked" || padding == "zeros",
                    "padding: must be \"masked\" or \"zeros\", got \"", padding, "\"");
  return padding == "zeros" ? Padding::kZeros : Padding::kMasked;
}

/// Checks what needs no values of symbolic lengths; spec_of() checks the rest.
void check_branches(const AttentionCall& call) {
  const auto& lengths = call.segment_lengths;
  const auto& rates = call.dilation_rates;
  TORCH_CHECK_VALUE(!lengths.empty(),
                    "segment_lengths: must hold at least one branch, got an empty list");
  TORCH_CHECK_VALUE(lengths.size() == rates.size(),
                    "segment_lengths and dilation_rates: must have the same length, got ",
                    lengths.size(), " and ", rates.size());
  for (size_t i = 0; i < lengths.size(); ++i) {
    const std::optional<int64_t> length = lengths[i].maybe_as_int();
    TORCH_CHECK_VALUE(!length.has_value() || *length > 0,
                      "segment_lengths: must be positive and below 2^63, got ", lengths[i],
                      " at index ", i);
    TORCH_CHECK_VALUE(0 < rates[i] && rates[i] <= kMaxLength,
                      "dilation_rates: must be positive and below 2^31, got ", rates[i],
                      " at index ", i);
  }
}

/// Before anything is allocated that grows with them.
void check_bounds(const AttentionCall& call) {
  const std::optional<int64_t> rows = call.query.sym_size(1).maybe_as_int();
  TORCH_CHECK_VALUE(call.block.has_value() || !rows.has_value() || *rows < kMaxLength,
                    "query: seq_len must be at least 0 and below 2^31 - 1, got ",
                    call.query.sym_size(1));
  const std::optional<int64_t> heads = call.query.sym_size(2).maybe_as_int();
  TORCH_CHECK_VALUE(!heads.has_value() || *heads <= kMaxHeads,
                    "query: heads must be at least 1 and below 2^16, got ", call.query.sym_size(2));
}

void check_offsets(const AttentionCall& call) {
  if (!call.head_offsets.has_value()) {
    return;
  }
  const at::Tensor& table = *call.head_offsets;
  check_tensor(table, "head_offsets");
  const auto branches = static_cast<int64_t>(call.segment_lengths.size());
  const auto heads = call.query.sym_size(2);
  check_table(table, call.query, "head_offsets", "[branches, heads]");
  TORCH_CHECK_VALUE(table.dim() == 2 && table.sym_size(0) == branches && table.sym_size(1) == heads,
                    "head_offsets: must be [branches, heads] = [", branches, ", ", heads, "], got ",
                    table.sym_sizes());
}

void check_sequences(const AttentionCall& call) {
  if (!call.sequences.has_value()) {
    return;
  }
  const at::Tensor& list = *call.sequences;
  check_tensor(list, "sequences");
  check_table(list, call.query, "sequences", "[sequences, 2]");
  TORCH_CHECK_VALUE(list.dim() == 2 && list.sym_size(1) == 2,
                    "sequences: must be [sequences, 2], of (first row, length), got ",
                    list.sym_sizes());
  TORCH_CHECK_VALUE(call.query.sym_size(0) == 1,
                    "query: must be [1, rows, heads, head_dim] where sequences are given, got ",
                    call.query.sym_sizes());
}

void check_words(const AttentionCall& call) {
  if (!call.pattern.has_value()) {
    return;
  }
  const at::Tensor& pattern = *call.pattern;
  check_tensor(pattern, "pattern");
  TORCH_CHECK_VALUE(pattern.scalar_type() == at::kInt && pattern.dim() == 1,
                    "pattern: must be a one-dimensional int32 tensor, got ",
                    dtype_name(pattern.scalar_type()), " ", pattern.sym_sizes());
  TORCH_CHECK_VALUE(pattern.device() == call.query.device(),
                    "pattern: must be on the device of query, ", call.query.device(), ", got ",
                    pattern.device());
}

std::vector<Branch> branches_of(const AttentionCall& call) {
  std::vector<Branch> branches;
  branches.reserve(call.dilation_rates.size());
  for (size_t i = 0; i < call.dilation_rates.size(); ++i) {
    branches.push_back({call.segment_lengths[i].expect_int(), call.dilation_rates[i]});
  }
  if (call.head_offsets.has_value()) {
    const at::Tensor table = call.head_offsets->contiguous();
    const auto* offsets = table.const_data_ptr<int64_t>();
    for (Branch& branch : branches) {
      branch.head_offsets.assign(offsets, offsets + table.size(1));
      offsets += table.size(1);
    }
  }
  return branches;
}

}  // namespace

std::string dtype_name(at::ScalarType dtype) {
  return std::string(c10::getDtypeNames(dtype).first);
}

void check_given(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.defined(), name, ": must be a tensor, got None");
  TORCH_CHECK_VALUE(!tensor.is_nested(), name,
                    ": must not be nested, got a nested tensor, which dilated_attention takes");
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided && !tensor.is_quantized(), name,
                    ": must be dense and not quantized, got ", tensor.toString());
}

void check_tensor(const at::Tensor& tensor, const char* name) {
  check_given(tensor, name);
  if (tensor.device().is_meta() || !tensor.has_storage()) {
    return;
  }
  const auto needed =
      at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize(),
                                       static_cast<size_t>(tensor.storage_offset()));
  const auto held = tensor.storage().nbytes();
  TORCH_CHECK_VALUE(tensor.numel() == 0 || needed <= held, name, ": must have memory of ", needed,
                    " bytes for sizes ", tensor.sizes(), ", got ", held,
                    ": it was freed or shrunk");
}

void check_input(const at::Tensor& tensor, const char* name) {
  check_rank(tensor, name);
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_VALUE(
      dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble,
      name, ": must be float16, bfloat16, float32 or float64, got ", dtype_name(dtype));
}

void check_table(const at::Tensor& table, const at::Tensor& query, const char* name,
                 const char* shape) {
  // A fake call's tensors are all on the meta device.
  TORCH_CHECK_VALUE(
      table.scalar_type() == at::kLong && (table.device().is_cpu() || query.device().is_meta()),
      name, ": must be an int64 tensor ", shape, " on the CPU, got ",
      dtype_name(table.scalar_type()), " on ", table.device());
}

void check_scale(const at::Tensor& query, const std::optional<double>& scale) {
  if (!scale.has_value()) {
    return;
  }
  const at::ScalarType dtype = lse_dtype(query);
  TORCH_CHECK_VALUE(std::isfinite(dtype == at::kDouble ? *scale : static_cast<float>(*scale)),
                    "scale: must be finite in ", dtype_name(dtype), ", got ", *scale);
}

void check_like_query(const AttentionCall& call, const at::Tensor& tensor, const char* name) {
  const at::Tensor& query = call.query;
  check_rank(tensor, name);
  TORCH_CHECK_VALUE(tensor.scalar_type() == query.scalar_type(), name,
                    ": must have the dtype of query, ", dtype_name(query.scalar_type()), ", got ",
                    dtype_name(tensor.scalar_type()));
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

void check_call(const AttentionCall& call) {
  check_input(call.query, "query");
  TORCH_CHECK_VALUE(call.query.scalar_type() != at::kDouble || !call.query.is_cuda(),
                    "query: must be on the CPU where it is float64, got one on ",
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
                    "key: must have heads that divide query's, ", heads, ", got ", kv_heads);
  TORCH_CHECK_VALUE(call.query.sym_size(3) >= 1 && call.query.sym_size(3) <= 256,
                    "query: head_dim must be at least 1 and at most 256, got ",
                    call.query.sym_size(3));
  padding_of(call.padding);
  check_bounds(call);
  check_branches(call);
  check_scale(call.query, call.scale);
  check_block(call);
  check_dropout(call);
  check_offsets(call);
  check_sequences(call);
  check_words(call);
}

void check_rows(const at::Tensor& query, const at::Tensor& tensor, at::ScalarType dtype,
                const char* name) {
  check_tensor(tensor, name);
  TORCH_CHECK_VALUE(tensor.sym_sizes() == query.sym_sizes() && tensor.scalar_type() == dtype &&
                        tensor.device() == query.device(),
                    name, ": must have the shape and device of query, ", query.sym_sizes(), " ",
                    query.device(), ", and be ", dtype_name(dtype), ", got ", tensor.sym_sizes(),
                    " ", tensor.device(), " ", dtype_name(tensor.scalar_type()));
}

void check_lse(const at::Tensor& query, const at::Tensor& tensor, const char* name) {
  check_tensor(tensor, name);
  const std::array<c10::SymInt, 3> rows{query.sym_size(0), query.sym_size(2), query.sym_size(1)};
  TORCH_CHECK_VALUE(
      tensor.sym_sizes() == c10::SymIntArrayRef(rows) && tensor.device() == query.device(), name,
      ": must be [batch, heads, seq_len] = ", c10::SymIntArrayRef(rows), " on ", query.device(),
      ", got ", tensor.sym_sizes(), " on ", tensor.device());
  TORCH_CHECK_VALUE(tensor.scalar_type() == lse_dtype(query), name, ": must be ",
                    dtype_name(lse_dtype(query)), ", got ", dtype_name(tensor.scalar_type()));
}

void check_apart(const char* written_name, const at::Tensor& written,
                 std::initializer_list<std::pair<const char*, const at::Tensor*>> tensors) {
  for (const auto& [name, tensor] : tensors) {
    if (tensor == nullptr || !tensor->defined()) {
      continue;
    }
    const auto status = at::get_overlap_status(written, *tensor);
    TORCH_CHECK_VALUE(
        status != at::MemOverlapStatus::Full && status != at::MemOverlapStatus::Partial,
        written_name, ": must not share memory with ", name, ", got ", written_name, " of sizes ",
        written.sizes(), " at element ", written.storage_offset(), " and ", name, " of sizes ",
        tensor->sizes(), " at element ", tensor->storage_offset(), " of one storage");
  }
}

at::ScalarType lse_dtype(const at::Tensor& query) {
  return query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::ScalarType result_dtype(const AttentionCall& call) {
  const bool is_partial = call.block.has_value() && call.block->partial;
  return is_partial ? lse_dtype(call.query) : call.query.scalar_type();
}

Directions wanted_directions(const AttentionCall& call, Directions reads) {
  const bool is_differentiated =
      call.query.requires_grad() || call.key.requires_grad() || call.value.requires_grad();
  const bool has_gradients = is_differentiated && !call.pattern.has_value() && !call.far;
  return has_gradients ? Directions::kBoth : reads;
}

std::vector<Sequence> sequences_of(const at::Tensor& list) {
  const auto numbers = list.accessor<int64_t, 2>();
  std::vector<Sequence> sequences(static_cast<size_t>(list.size(0)));
  for (int64_t i = 0; i < list.size(0); ++i) {
    sequences[static_cast<size_t>(i)] = {numbers[i][0], numbers[i][1]};
  }
  return sequences;
}

bool has_gaps(const AttentionCall& call) {
  if (!call.sequences.has_value()) {
    return false;
  }
  const auto numbers = call.sequences->accessor<int64_t, 2>();
  int64_t rows = call.block.has_value() ? call.block->seq_len : call.query.size(1);
  for (int64_t i = 0; i < call.sequences->size(0); ++i) {
    rows -= numbers[i][1];
  }
  return rows != 0;
}

PatternSpec spec_of(const AttentionCall& call, Directions reads) {
  PatternSpec spec;
  spec.seq_len = call.query.size(1);
  spec.branches = branches_of(call);
  spec.directions = wanted_directions(call, reads);
  spec.heads = call.query.size(2);
  spec.kv_heads = call.key.size(2);
  spec.is_causal = call.is_causal;
  spec.padding = padding_of(call.padding);
  if (call.block.has_value()) {
    const AttentionBlock& block = *call.block;
    spec.seq_len = block.seq_len;
    spec.queries = ranges_of(block.queries, call.query.size(1));
    spec.keys = ranges_of(block.keys, call.key.size(1));
    spec.rows = query_rows_of(call);
  }
  if (call.far.has_value()) {
    spec.far_keys = ranges_of(call.far->keys, call.far->key ? call.far->key->size(1) : 0);
  }
  if (call.sequences.has_value()) {
    spec.sequences = sequences_of(*call.sequences);
  }
  try {
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
                               dtype_name(tensor.scalar_type())));
  }
}

double scale_of(const at::Tensor& query, const std::optional<double>& scale) {
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(query.size(3))));
}

at::Tensor readable(const at::Tensor& tensor) {
  const bool is_readable = (tensor.stride(3) == 1 || tensor.size(3) == 1) &&
                           tensor.stride(1) <= std::numeric_limits<int32_t>::max();
  return is_readable ? tensor : tensor.contiguous();
}

namespace {

template <typename Rows, typename Data>
Rows rows_at(Data* data, const at::Tensor& tensor) {
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  const kernels::Strides strides{tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  const int64_t lengths[] = {reinterpret_cast<intptr_t>(data), bytes * tensor.size(3),
                             bytes * strides.batch, bytes * strides.row, bytes * strides.head};
  const bool is_aligned =
      std::ranges::all_of(lengths, [](int64_t length) { return length % 16 == 0; });
  return {data, strides, static_cast<int32_t>(bytes), is_aligned};
}

}  // namespace

kernels::Rows rows_of(const at::Tensor& tensor) {
  return rows_at<kernels::Rows>(tensor.const_data_ptr(), tensor);
}

kernels::MutableRows mutable_rows_of(const at::Tensor& tensor) {
  return rows_at<kernels::MutableRows>(tensor.mutable_data_ptr(), tensor);
}

}  // namespace dilated::ops

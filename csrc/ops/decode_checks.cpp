// What must hold of the arguments of decode_attend, decode_append and decode_step.
#include <limits>

#include "ops/checks.h"
#include "ops/decode.h"

namespace dilated::ops {
namespace {

void check_alike(const at::Tensor& tensor, const char* name, const at::Tensor& like,
                 const char* like_name) {
  check_tensor(tensor, name);
  TORCH_CHECK_VALUE(tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device(),
                    name, ": must have the dtype and device of ", like_name, ", ",
                    dtype_name(like.scalar_type()), " on ", like.device(), ", got ",
                    dtype_name(tensor.scalar_type()), " on ", tensor.device());
}

/// Rows of a cache that forgets, or of an ordinary one.
void check_cache(const at::Tensor& rows, const char* name, const at::Tensor& like,
                 const char* like_name) {
  check_alike(rows, name, like, like_name);
  TORCH_CHECK_VALUE(
      (rows.dim() == 3 || rows.dim() == 4) && rows.sym_size(0) == like.sym_size(0) &&
          rows.sym_size(-1) == like.sym_size(3),
      name, ": must be [batch, rows, head_dim] or [batch, seq_len, kv_heads, head_dim], as ",
      like_name, " ", like.sym_sizes(), " has it, got ", rows.sym_sizes());
}

void check_integers(const at::Tensor& tensor, const char* name, const at::Tensor& like,
                    const char* like_name) {
  check_tensor(tensor, name);
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kLong && tensor.device() == like.device() &&
                        tensor.is_contiguous(),
                    name, ": must be contiguous, int64 and on the device of ", like_name, ", ",
                    like.device(), ", got ", dtype_name(tensor.scalar_type()), " on ",
                    tensor.device(), " with strides ", tensor.sym_strides());
}

void check_decode(const at::Tensor& rows, const char* name, const DecodeCall& call) {
  check_input(rows, name);
  TORCH_CHECK_VALUE(rows.scalar_type() != at::kDouble || !rows.is_cuda(), name,
                    ": must be on the CPU where it is float64, got one on ", rows.device());
  TORCH_CHECK_VALUE(1 <= rows.sym_size(3) && rows.sym_size(3) <= 256, name,
                    ": head_dim must be at least 1 and at most 256, got ", rows.sym_size(3));
  const size_t branches = call.segment_lengths.size();
  TORCH_CHECK_VALUE(
      0 < branches && branches <= kernels::kMostBranches && branches == call.dilation_rates.size(),
      "segment_lengths and dilation_rates: must have the same length, from 1 to ",
      kernels::kMostBranches, ", got ", branches, " and ", call.dilation_rates.size());
  for (size_t i = 0; i < branches; ++i) {
    const int64_t w = call.segment_lengths[i], r = call.dilation_rates[i];
    TORCH_CHECK_VALUE(w > 0, "segment_lengths: must be positive, got ", w);
    TORCH_CHECK_VALUE(0 < r && r <= std::numeric_limits<int32_t>::max(),
                      "dilation_rates: must be positive and below 2^31, got ", r);
  }
  check_integers(call.lattices, "lattices", rows, name);
  TORCH_CHECK_VALUE(call.lattices.dim() == 3 &&
                        call.lattices.sym_size(0) == static_cast<int64_t>(branches) &&
                        call.lattices.sym_size(1) > 0 && call.lattices.sym_size(2) == 4,
                    "lattices: must be [branches, heads, 4] of ", branches, " branches, got ",
                    call.lattices.sym_sizes());
  const auto check_batch = [&](const at::Tensor& tensor, const char* tensor_name) {
    check_integers(tensor, tensor_name, rows, name);
    TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.sym_size(0) == rows.sym_size(0), tensor_name,
                      ": must be [batch] = [", rows.sym_size(0), "], got ", tensor.sym_sizes());
  };
  check_batch(call.lengths, "lengths");
  if (call.counts.has_value()) {
    check_batch(*call.counts, "counts");
  }
}

}  // namespace

void check_attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const DecodeCall& call, int64_t kv_heads, const std::optional<double>& scale) {
  check_decode(query, "query", call);
  check_cache(key, "key", query, "query");
  check_cache(value, "value", query, "query");
  TORCH_CHECK_VALUE(key.sym_sizes() == value.sym_sizes(), "value: must have the shape of key, ",
                    key.sym_sizes(), ", got ", value.sym_sizes());
  TORCH_CHECK_VALUE(call.lattices.sym_size(1) == query.sym_size(2),
                    "lattices: must be of query's heads, ", query.sym_size(2), ", got ",
                    call.lattices.sym_size(1));
  TORCH_CHECK_VALUE(kv_heads > 0 && query.sym_size(2) % kv_heads == 0,
                    "kv_heads: must divide query's heads, ", query.sym_size(2), ", got ", kv_heads);
  TORCH_CHECK_VALUE(key.dim() == 3 || key.sym_size(2) == kv_heads, "key: must have kv_heads, ",
                    kv_heads, ", got ", key.sym_sizes());
  check_scale(query, scale);
}

void check_append(const at::Tensor& key_rows, const at::Tensor& value_rows, const at::Tensor& key,
                  const at::Tensor& value, const DecodeCall& call) {
  check_decode(key, "key", call);
  check_alike(value, "value", key, "key");
  TORCH_CHECK_VALUE(value.sym_sizes() == key.sym_sizes(), "value: must have the shape of key, ",
                    key.sym_sizes(), ", got ", value.sym_sizes());
  check_cache(key_rows, "key_rows", key, "key");
  check_cache(value_rows, "value_rows", key, "key");
  TORCH_CHECK_VALUE(key_rows.dim() == 3 && key_rows.is_contiguous() &&
                        value_rows.sym_sizes() == key_rows.sym_sizes() &&
                        value_rows.is_contiguous(),
                    "key_rows and value_rows: must be contiguous and alike, [batch, rows, "
                    "head_dim], got ",
                    key_rows.sym_sizes(), " and ", value_rows.sym_sizes());
  TORCH_CHECK_VALUE(call.lattices.sym_size(1) % key.sym_size(2) == 0,
                    "key: must have heads that divide those of lattices, ",
                    call.lattices.sym_size(1), ", got ", key.sym_size(2));
}

void check_step(const at::Tensor& key_rows, const at::Tensor& value_rows, const at::Tensor& query,
                const at::Tensor& key, const at::Tensor& value, const DecodeCall& call,
                const std::optional<double>& scale) {
  check_append(key_rows, value_rows, key, value, call);
  const c10::SymInt kv_heads = key.sym_size(2);
  check_attend(query, key_rows, value_rows, call, kv_heads.expect_int(), scale);
  TORCH_CHECK_VALUE(query.sym_size(1) == key.sym_size(1), "query: must have the positions of key, ",
                    key.sym_size(1), ", got ", query.sym_size(1));
}

}  // namespace dilated::ops

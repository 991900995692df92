// From the arguments of decode_attend, decode_append and decode_step to a kernel's, on any device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "kernels/decode.h"

namespace dilated::ops {

using OptionalTensor = std::optional<at::Tensor>;

/// The arguments that both have after their rows, as the dispatcher passes them.
struct DecodeCall {
  const at::Tensor& lengths;
  const at::Tensor& lattices;
  at::IntArrayRef segment_lengths, dilation_rates;
  const OptionalTensor& counts;
};

/// Checks of the three operators' arguments; work on fake tensors.
void check_attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const DecodeCall& call, int64_t kv_heads, const std::optional<double>& scale);
void check_append(const at::Tensor& key_rows, const at::Tensor& value_rows, const at::Tensor& key,
                  const at::Tensor& value, const DecodeCall& call);
void check_step(const at::Tensor& key_rows, const at::Tensor& value_rows, const at::Tensor& query,
                const at::Tensor& key, const at::Tensor& value, const DecodeCall& call,
                const std::optional<double>& scale);

/// Holds the tensors that `args` points into.
struct AttendCall {
  at::Tensor query, key, value, out, lse;
  kernels::DecodeAttendArgs args{};
};

/// Checks the arguments and allocates the results.
AttendCall prepare_attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const DecodeCall& call, int64_t kv_heads,
                          const std::optional<double>& scale);

struct AppendCall {
  at::Tensor key, value;
  kernels::DecodeAppendArgs args{};
};

/// Checks the arguments.
AppendCall prepare_append(const at::Tensor& key_rows, const at::Tensor& value_rows,
                          const at::Tensor& key, const at::Tensor& value, const DecodeCall& call,
                          const std::optional<int64_t>& max_seq_len);

}  // namespace dilated::ops

// decode_attend, decode_append and decode_step: the CPU's kernels, fake tensors, and what every
// device's kernels are given.
#include "ops/decode.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "kernels/cpu/decode.h"
#include "ops/checks.h"
#include "ops/in_place.h"

namespace dilated::ops {
namespace {

using Results = std::tuple<at::Tensor, at::Tensor>;

/// [batch, rows, head_dim] of a cache that forgets as one of a single head.
at::Tensor with_heads(const at::Tensor& rows) { return rows.dim() == 3 ? rows.unsqueeze(2) : rows; }

void fill(const DecodeCall& call, const at::Tensor& rows, kernels::DecodeArgs& args) {
  args.dtype = dtype_of(rows);
  args.batch = rows.size(0);
  args.queries = rows.size(1);
  args.heads = call.lattices.size(1);
  args.head_dim = rows.size(3);
  args.branches = static_cast<int32_t>(call.segment_lengths.size());
  std::ranges::copy(call.segment_lengths, args.segment_lengths);
  std::ranges::copy(call.dilation_rates, args.dilation_rates);
  static_assert(sizeof(kernels::Lattice) == 4 * sizeof(int64_t));
  args.lattices = static_cast<const kernels::Lattice*>(call.lattices.const_data_ptr());
  args.lengths = call.lengths.const_data_ptr<int64_t>();
  args.counts = call.counts.has_value() ? call.counts->const_data_ptr<int64_t>() : nullptr;
}

Results attend_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                   const at::Tensor& lengths, const at::Tensor& lattices,
                   at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
                   int64_t kv_heads, const OptionalTensor& counts, std::optional<double> scale) {
  const AttendCall call =
      prepare_attend(query, key, value,
                     {lengths, lattices, segment_lengths, dilation_rates, counts}, kv_heads, scale);
  kernels::cpu::decode_attend(call.args);
  return {call.out, call.lse};
}

void append_cpu(at::Tensor& key_rows, at::Tensor& value_rows, at::Tensor& lengths,
                const at::Tensor& key, const at::Tensor& value, const at::Tensor& lattices,
                at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
                const OptionalTensor& counts, std::optional<int64_t> max_seq_len) {
  const AppendCall call =
      prepare_append(key_rows, value_rows, key, value,
                     {lengths, lattices, segment_lengths, dilation_rates, counts}, max_seq_len);
  TORCH_CHECK_VALUE(kernels::cpu::decode_append(call.args),
                    "key: must leave every text at most max_seq_len positions, ", *max_seq_len,
                    ", got ", key.size(1), " more than ", lengths);
}

Results empty_results(const at::Tensor& query) {
  return {query.new_empty_symint(query.sym_sizes()),
          query.new_empty_symint({query.sym_size(0), query.sym_size(2), query.sym_size(1)},
                                 lse_dtype(query))};
}

Results step_cpu(at::Tensor& key_rows, at::Tensor& value_rows, at::Tensor& lengths,
                 const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                 const at::Tensor& lattices, at::IntArrayRef segment_lengths,
                 at::IntArrayRef dilation_rates, const OptionalTensor& counts,
                 std::optional<double> scale, std::optional<int64_t> max_seq_len) {
  const DecodeCall call{lengths, lattices, segment_lengths, dilation_rates, counts};
  check_step(key_rows, value_rows, query, key, value, call, scale);
  append_cpu(key_rows, value_rows, lengths, key, value, lattices, segment_lengths, dilation_rates,
             counts, max_seq_len);
  return attend_cpu(query, key_rows, value_rows, lengths, lattices, segment_lengths, dilation_rates,
                    key.size(2), counts, scale);
}

Results attend_meta(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                    const at::Tensor& lengths, const at::Tensor& lattices,
                    at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
                    int64_t kv_heads, const OptionalTensor& counts, std::optional<double> scale) {
  check_attend(query, key, value, {lengths, lattices, segment_lengths, dilation_rates, counts},
               kv_heads, scale);
  return empty_results(query);
}

void append_meta(at::Tensor& key_rows, at::Tensor& value_rows, at::Tensor& lengths,
                 const at::Tensor& key, const at::Tensor& value, const at::Tensor& lattices,
                 at::IntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
                 const OptionalTensor& counts, std::optional<int64_t> /*max_seq_len*/) {
  check_append(key_rows, value_rows, key, value,
               {lengths, lattices, segment_lengths, dilation_rates, counts});
}

Results step_meta(at::Tensor& key_rows, at::Tensor& value_rows, at::Tensor& lengths,
                  const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const at::Tensor& lattices, at::IntArrayRef segment_lengths,
                  at::IntArrayRef dilation_rates, const OptionalTensor& counts,
                  std::optional<double> scale, std::optional<int64_t> /*max_seq_len*/) {
  const DecodeCall call{lengths, lattices, segment_lengths, dilation_rates, counts};
  check_step(key_rows, value_rows, query, key, value, call, scale);
  return empty_results(query);
}

}  // namespace

AttendCall prepare_attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const DecodeCall& call, int64_t kv_heads,
                          const std::optional<double>& scale) {
  check_attend(query, key, value, call, kv_heads, scale);
  AttendCall prepared;
  fill(call, query, prepared.args);
  prepared.args.forgets = key.dim() == 3;
  prepared.query = readable(query);
  prepared.key = readable(with_heads(key));
  prepared.value = readable(with_heads(value));
  prepared.out = at::empty(query.sizes(), query.options());
  prepared.lse = at::empty({query.size(0), query.size(2), query.size(1)},
                           query.options().dtype(lse_dtype(query)));
  prepared.args.scale = scale_of(query, scale);
  prepared.args.query = rows_of(prepared.query);
  prepared.args.key = rows_of(prepared.key);
  prepared.args.value = rows_of(prepared.value);
  prepared.args.out = mutable_rows_of(prepared.out);
  prepared.args.lse = prepared.lse.mutable_data_ptr();
  if (prepared.args.forgets) {  // a lattice's rows are one KV head's
    prepared.args.key.strides.head = prepared.args.value.strides.head = 0;
  }
  prepared.args.kv_heads = kv_heads;
  prepared.args.rows = key.size(1);
  return prepared;
}

AppendCall prepare_append(const at::Tensor& key_rows, const at::Tensor& value_rows,
                          const at::Tensor& key, const at::Tensor& value, const DecodeCall& call,
                          const std::optional<int64_t>& max_seq_len) {
  check_append(key_rows, value_rows, key, value, call);
  AppendCall prepared;
  fill(call, key, prepared.args);
  prepared.key = readable(key);
  prepared.value = readable(value);
  prepared.args.kv_heads = key.size(2);
  prepared.args.rows = key_rows.size(1);
  prepared.args.max_seq_len = max_seq_len.value_or(std::numeric_limits<int64_t>::max());
  prepared.args.key = rows_of(prepared.key);
  prepared.args.value = rows_of(prepared.value);
  prepared.args.key_rows = mutable_rows_of(key_rows.unsqueeze(2));
  prepared.args.value_rows = mutable_rows_of(value_rows.unsqueeze(2));
  prepared.args.lengths_after = call.lengths.mutable_data_ptr<int64_t>();
  return prepared;
}

}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, CPU, m) {
  m.impl("decode_attend", &dilated::ops::attend_cpu);
  m.impl("decode_append", &dilated::ops::append_cpu);
  m.impl("decode_step", &dilated::ops::step_cpu);
}

TORCH_LIBRARY_IMPL(dilated, Meta, m) {
  m.impl("decode_attend", &dilated::ops::attend_meta);
  m.impl("decode_append", &dilated::ops::append_meta);
  m.impl("decode_step", &dilated::ops::step_meta);
}

TORCH_LIBRARY_IMPL(dilated, Autograd, m) {
  m.impl("decode_attend", dilated::ops::in_place("use attention, which is"));
  m.impl("decode_append", dilated::ops::in_place("detach the rows"));
  m.impl("decode_step", dilated::ops::in_place("use attention, which is"));
}

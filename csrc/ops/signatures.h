// The attention operators' signatures, written once: from the schemas' arguments to a call, and to
// what a device does with it.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include "ops/attention.h"
#include "ops/query_sums.h"

namespace dilated::ops {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalScalar = std::optional<at::Scalar>;
using Results = std::tuple<at::Tensor, at::Tensor>;                // out, lse
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // of query, key, value

using RunForward = Results (*)(const AttentionCall&);
using RunBackward = Gradients (*)(const AttentionCall&, const BackwardInputs&);
using RunBackwardInto = KeyGradients (*)(const AttentionCall&, const BackwardInputs&, at::Tensor&);

template <RunForward kRun>
Results attention_with(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                       c10::SymIntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
                       const OptionalTensor& head_offsets, bool is_causal,
                       const OptionalScalar& scale, std::string_view padding, double dropout_p,
                       const OptionalTensor& dropout_seed, const OptionalTensor& pattern) {
  return kRun({query, key, value, segment_lengths, dilation_rates, head_offsets, is_causal, scale,
               padding, dropout_p, dropout_seed, pattern});
}

using AttentionForward = decltype(attention_with<forward_meta>);
/// dilated::attention, whatever the device, gradients included.
const c10::TypedOperatorHandle<AttentionForward>& attention_op();

template <RunBackward kRun>
Gradients attention_backward_with(const at::Tensor& grad_out, const OptionalTensor& grad_lse,
                                  const at::Tensor& query, const at::Tensor& key,
                                  const at::Tensor& value, const at::Tensor& out,
                                  const at::Tensor& lse, c10::SymIntArrayRef segment_lengths,
                                  at::IntArrayRef dilation_rates,
                                  const OptionalTensor& head_offsets, bool is_causal,
                                  const OptionalScalar& scale, std::string_view padding,
                                  double dropout_p, const OptionalTensor& dropout_seed,
                                  const OptionalTensor& pattern) {
  return kRun({query, key, value, segment_lengths, dilation_rates, head_offsets, is_causal, scale,
               padding, dropout_p, dropout_seed, pattern},
              {grad_out, grad_lse, out, lse});
}

template <RunForward kRun>
Results attention_block_with(const at::Tensor& query, const at::Tensor& key,
                             const at::Tensor& value, int64_t seq_len, int64_t query_begin,
                             int64_t key_begin, c10::SymIntArrayRef segment_lengths,
                             at::IntArrayRef dilation_rates, const OptionalTensor& out,
                             const OptionalTensor& lse, const OptionalTensor& head_offsets,
                             bool is_causal, const OptionalScalar& scale, std::string_view padding,
                             double dropout_p, const OptionalTensor& dropout_seed,
                             const OptionalTensor& pattern, bool partial) {
  return kRun({query, key, value, segment_lengths, dilation_rates, head_offsets, is_causal, scale,
               padding, dropout_p, dropout_seed, pattern,
               AttentionBlock{seq_len, query_begin, key_begin, out, lse, partial}});
}

template <RunBackward kRun>
Gradients attention_block_backward_with(
    const at::Tensor& grad_out, const OptionalTensor& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
    int64_t seq_len, int64_t query_begin, int64_t key_begin, c10::SymIntArrayRef segment_lengths,
    at::IntArrayRef dilation_rates, const OptionalTensor& head_offsets, bool is_causal,
    const OptionalScalar& scale, std::string_view padding, double dropout_p,
    const OptionalTensor& dropout_seed, const OptionalTensor& pattern, bool partial) {
  return kRun(
      {query, key, value, segment_lengths, dilation_rates, head_offsets, is_causal, scale, padding,
       dropout_p, dropout_seed, pattern,
       AttentionBlock{seq_len, query_begin, key_begin, std::nullopt, std::nullopt, partial}},
      {grad_out, grad_lse, out, lse});
}

template <RunBackwardInto kRun>
KeyGradients attention_block_backward_into_with(
    at::Tensor& grad_query_sums, const at::Tensor& grad_out, const OptionalTensor& grad_lse,
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
    const at::Tensor& lse, int64_t seq_len, int64_t query_begin, int64_t key_begin,
    c10::SymIntArrayRef segment_lengths, at::IntArrayRef dilation_rates,
    const OptionalTensor& head_offsets, bool is_causal, const OptionalScalar& scale,
    std::string_view padding, double dropout_p, const OptionalTensor& dropout_seed,
    const OptionalTensor& pattern) {
  return kRun({query, key, value, segment_lengths, dilation_rates, head_offsets, is_causal, scale,
               padding, dropout_p, dropout_seed, pattern,
               AttentionBlock{seq_len, query_begin, key_begin, std::nullopt, std::nullopt,
                              /*partial=*/true}},
              {grad_out, grad_lse, out, lse}, grad_query_sums);
}

}  // namespace dilated::ops

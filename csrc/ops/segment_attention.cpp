// Attention with a single branch: the same operator, spelt for one segment length and one rate.
#include <dilated/ops.h>
#include <torch/library.h>

namespace dilated {

std::tuple<at::Tensor, at::Tensor> segment_attention(const at::Tensor& query, const at::Tensor& key,
                                                     const at::Tensor& value,
                                                     int64_t segment_length, int64_t dilation_rate,
                                                     const AttentionOptions& options) {
  return attention(query, key, value, segment_length, dilation_rate, options);
}

namespace {

std::tuple<at::Tensor, at::Tensor> segment_attention_composite(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t segment_length,
    int64_t dilation_rate, const std::optional<at::Tensor>& head_offsets, bool is_causal,
    std::optional<double> scale, std::string_view padding, double dropout_p,
    const std::optional<at::Tensor>& dropout_seed, const std::optional<at::Tensor>& pattern) {
  return segment_attention(
      query, key, value, segment_length, dilation_rate,
      {head_offsets, is_causal, scale, std::string(padding), dropout_p, dropout_seed, pattern});
}

}  // namespace
}  // namespace dilated

TORCH_LIBRARY_IMPL(dilated, CompositeImplicitAutograd, m) {
  m.impl("segment_attention", &dilated::segment_attention_composite);
}

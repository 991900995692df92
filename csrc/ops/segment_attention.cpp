// Attention with a single branch: the same operator, spelt for one segment length and one rate.
#include <dilated/ops.h>
#include <torch/library.h>

#include "ops/signatures.h"

namespace dilated {

std::tuple<at::Tensor, at::Tensor> segment_attention(const at::Tensor& query, const at::Tensor& key,
                                                     const at::Tensor& value,
                                                     int64_t segment_length, int64_t dilation_rate,
                                                     const AttentionOptions& options) {
  return attention(query, key, value, segment_length, dilation_rate, options);
}

namespace ops {
namespace {

Results segment_attention_composite(const at::Tensor& query, const at::Tensor& key,
                                    const at::Tensor& value, c10::SymInt segment_length,
                                    int64_t dilation_rate, const OptionalTensor& head_offsets,
                                    bool is_causal, const OptionalScalar& scale,
                                    std::string_view padding, double dropout_p,
                                    const OptionalTensor& dropout_seed,
                                    const OptionalTensor& pattern) {
  return attention_op().call(query, key, value, segment_length, dilation_rate, head_offsets,
                             is_causal, scale, padding, dropout_p, dropout_seed, pattern);
}

}  // namespace
}  // namespace ops
}  // namespace dilated

TORCH_LIBRARY_IMPL(dilated, CompositeImplicitAutograd, m) {
  m.impl("segment_attention", &dilated::ops::segment_attention_composite);
}

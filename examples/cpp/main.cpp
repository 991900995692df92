// Dilated attention in a LibTorch program: plans a pattern, runs forward and backward, and compares
// both with the definition, computed densely in float64.
#include <dilated/dilated.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <vector>

namespace {

constexpr int64_t kBatch = 2, kSeqLen = 200, kHeads = 4, kKvHeads = 2, kHeadDim = 32;
const std::vector<int64_t> kSegmentLengths{32, 128};
const std::vector<int64_t> kDilationRates{1, 4};

dilated::PatternSpec make_spec() {
  dilated::PatternSpec spec;
  spec.seq_len = kSeqLen;
  for (size_t i = 0; i < kSegmentLengths.size(); ++i) {
    spec.branches.push_back({kSegmentLengths[i], kDilationRates[i]});
  }
  spec.heads = kHeads;
  spec.kv_heads = kKvHeads;
  spec.is_causal = true;
  return spec;
}

/// In how many branches query p of head h attends to key t: [heads, queries, keys].
torch::Tensor multiplicity(const dilated::PatternSpec& spec) {
  auto counts = torch::zeros({kHeads, kSeqLen, kSeqLen}, torch::kFloat64);
  auto count = counts.accessor<double, 3>();
  for (const auto& [w, r, offsets] : spec.branches) {
    for (int64_t h = 0; h < kHeads; ++h) {
      const int64_t offset = h % r;
      for (int64_t p = 0; p < kSeqLen; ++p) {
        for (int64_t t = p / w * w; t <= p; ++t) {  // causal: no key after p
          count[h][p][t] += p % w % r == offset && t % w % r == offset;
        }
      }
    }
  }
  return counts;
}

/// One softmax over all branches' keys: out_p = sum_t k_pt exp(s_pt) v_t / sum_t k_pt exp(s_pt).
torch::Tensor dense_attention(const torch::Tensor& query, const torch::Tensor& key,
                              const torch::Tensor& value, const torch::Tensor& counts) {
  const auto repeated_key = key.repeat_interleave(kHeads / kKvHeads, 2);
  const auto repeated_value = value.repeat_interleave(kHeads / kKvHeads, 2);
  const auto scores = torch::einsum("bphd,bthd->bhpt", {query, repeated_key}) / std::sqrt(kHeadDim);
  const auto weights = counts * torch::exp(scores);
  const auto probabilities = weights / weights.sum(-1, true).clamp_min(1e-300);  // 0 if no keys
  return torch::einsum("bhpt,bthd->bphd", {probabilities, repeated_value});
}

/// Gradients of sum(out * grad_out).
std::vector<torch::Tensor> gradients(const torch::Tensor& out, const torch::Tensor& grad_out,
                                     const std::vector<torch::Tensor>& inputs) {
  return torch::autograd::grad({out}, inputs, {grad_out});
}

double difference(const torch::Tensor& a, const torch::Tensor& b) {
  return (a.to(torch::kFloat64) - b).abs().max().item<double>();
}

}  // namespace

int main() {
  torch::manual_seed(0);
  const dilated::PatternSpec spec = make_spec();

  // The operator plans by itself when it gets no pattern; a program that meets the same shape again
  // plans once and keeps the pattern.
  std::vector<int32_t> words = dilated::plan(spec);
  const dilated::PatternReport report = dilated::report(spec, words);
  std::cout << "pattern: " << report.bytes << " bytes, " << report.tiles << " tiles, "
            << report.distinct << " pairs of query and key\n";

  const auto inputs = std::vector<torch::Tensor>{
      torch::randn({kBatch, kSeqLen, kHeads, kHeadDim}).requires_grad_(),
      torch::randn({kBatch, kSeqLen, kKvHeads, kHeadDim}).requires_grad_(),
      torch::randn({kBatch, kSeqLen, kKvHeads, kHeadDim}).requires_grad_()};
  dilated::AttentionOptions options;
  options.is_causal = true;
  options.pattern =
      torch::from_blob(words.data(), {static_cast<int64_t>(words.size())}, torch::kInt32);
  const auto [out, lse] =
      dilated::attention(inputs[0], inputs[1], inputs[2], kSegmentLengths, kDilationRates, options);
  const auto grad_out = torch::randn_like(out);
  const auto grads = gradients(out, grad_out, inputs);

  std::vector<torch::Tensor> exact;
  for (const auto& input : inputs) {
    exact.push_back(input.detach().to(torch::kFloat64).requires_grad_());
  }
  const auto expected = dense_attention(exact[0], exact[1], exact[2], multiplicity(spec));
  const auto expected_grads = gradients(expected, grad_out.to(torch::kFloat64), exact);

  double error = difference(out, expected);
  std::cout << "forward:  largest difference from the dense computation " << error << "\n";
  for (size_t i = 0; i < grads.size(); ++i) {
    error = std::max(error, difference(grads[i], expected_grads[i]));
  }
  std::cout << "backward: largest difference so far " << error << "\n";

  // float32 has 24 bits: sums of up to 200 terms of order one stay well within this.
  const bool passed = error < 1e-4;
  std::cout << (passed ? "passed" : "FAILED") << "\n";
  return passed ? 0 : 1;
}

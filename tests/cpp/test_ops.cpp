// The operators' C++ functions, through the installed library. Their numbers are tested from
// Python; here: that the functions reach the operators with all arguments, gradients and errors
// included.
#include <ATen/ATen.h>
#include <dilated/dilated.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace dilated {
namespace {

at::Tensor random_rows(int64_t seq_len, int64_t heads) {
  return at::randn({2, seq_len, heads, 16}, at::kDouble);
}

void expect_close(const at::Tensor& actual, const at::Tensor& expected) {
  EXPECT_TRUE(at::allclose(actual, expected, 1e-10, 1e-12)) << (actual - expected).abs().max();
}

TEST(Attention, OneFullSegmentIsOrdinaryAttention) {
  const auto q = random_rows(70, 4), k = random_rows(70, 4), v = random_rows(70, 4);
  for (const bool is_causal : {false, true}) {
    AttentionOptions options;
    options.is_causal = is_causal;
    options.scale = 0.3;
    const auto [out, lse] = attention(q, k, v, {100}, {1}, options);
    auto scores = at::einsum("bphd,bthd->bhpt", {q, k}) * 0.3;
    if (is_causal) {
      const auto future = at::ones({70, 70}, at::kBool).triu(1);
      scores = scores.masked_fill(future, -std::numeric_limits<double>::infinity());
    }
    expect_close(lse, at::logsumexp(scores, -1));
    expect_close(out, at::einsum("bhpt,bthd->bphd", {at::softmax(scores, -1), v}));
  }
}

TEST(Attention, GradientsAreDirectionalDerivatives) {
  const auto q = random_rows(40, 4), k = random_rows(40, 2), v = random_rows(40, 2);
  const auto loss = [](const std::vector<at::Tensor>& x) {
    const auto [out, lse] = attention(x[0], x[1], x[2], {16, 40}, {1, 3});
    return (out * out).sum() + lse.exp().sum();
  };
  const std::vector<at::Tensor> inputs = {q.clone().requires_grad_(), k.clone().requires_grad_(),
                                          v.clone().requires_grad_()};
  const auto grads = torch::autograd::grad({loss(inputs)}, inputs);
  const double step = 1e-6;
  double slope = 0;
  std::vector<at::Tensor> ahead, behind;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto x = inputs[i].detach(), direction = at::randn_like(x);
    slope += (grads[i] * direction).sum().item<double>();
    ahead.push_back(x + step * direction);
    behind.push_back(x - step * direction);
  }
  const double difference = (loss(ahead) - loss(behind)).item<double>() / (2 * step);
  EXPECT_NEAR(slope, difference, 1e-6 * std::abs(difference));
}

TEST(Attention, UncoveredRowsAreZeroAndMinusInfinity) {
  const auto x = random_rows(32, 1);
  const auto [out, lse] = attention(x, x, x, {32}, {4});  // head 0 takes positions 0, 4, 8, ...
  const auto covered = at::arange(32).remainder(4).eq(0);
  EXPECT_TRUE(at::isneginf(lse).eq(covered.logical_not()).all().item<bool>());
  EXPECT_TRUE(out.index({at::indexing::Slice(), covered.logical_not()}).eq(0).all().item<bool>());
  EXPECT_TRUE(out.index({at::indexing::Slice(), covered}).ne(0).all().item<bool>());
}

TEST(Attention, SequencesOfABatchAreAsIfAlone) {
  const auto q = random_rows(60, 4).slice(0, 0, 1), k = random_rows(60, 2).slice(0, 0, 1);
  AttentionOptions options;
  options.sequences = at::tensor({0, 25, 30, 30}, at::kLong).view({2, 2});
  const std::vector<at::Tensor> leaves = {q.clone().requires_grad_(), k.clone().requires_grad_()};
  const auto [out, lse] = attention(leaves[0], leaves[1], leaves[1], {16, 40}, {1, 3}, options);
  const auto grads = torch::autograd::grad({out.square().sum()}, leaves);
  for (const auto& [begin, end] : {std::pair(0, 25), std::pair(30, 60)}) {
    const std::vector<at::Tensor> alone = {q.slice(1, begin, end).clone().requires_grad_(),
                                           k.slice(1, begin, end).clone().requires_grad_()};
    const auto [one, one_lse] = attention(alone[0], alone[1], alone[1], {16, 40}, {1, 3});
    expect_close(out.slice(1, begin, end), one);
    expect_close(lse.slice(2, begin, end), one_lse);
    const auto expected = torch::autograd::grad({one.square().sum()}, alone);
    expect_close(grads[0].slice(1, begin, end), expected[0]);
    expect_close(grads[1].slice(1, begin, end), expected[1]);
  }
  EXPECT_TRUE(out.slice(1, 25, 30).eq(0).all().item<bool>());
  EXPECT_TRUE(at::isneginf(lse.slice(2, 25, 30)).all().item<bool>());
}

TEST(AttentionBlock, SequencesMayCrossBlocks) {
  const auto q = random_rows(60, 4).slice(0, 0, 1), k = random_rows(60, 2).slice(0, 0, 1);
  AttentionOptions options;
  options.sequences = at::tensor({0, 25, 30, 30}, at::kLong).view({2, 2});
  const auto [whole, whole_lse] = attention(q, k, k, {16, 40}, {1, 3}, options);
  AttentionBlock block{60};
  block.partial = true;
  std::tie(block.out, block.lse) =
      attention_block(q, k.slice(1, 0, 20), k.slice(1, 0, 20), block, {16, 40}, {1, 3}, options);
  block.keys = {20};
  block.partial = false;
  const auto [out, lse] =
      attention_block(q, k.slice(1, 20, 60), k.slice(1, 20, 60), block, {16, 40}, {1, 3}, options);
  expect_close(out, whole);
  EXPECT_TRUE(at::allclose(lse, whole_lse));
}

TEST(AttentionBlock, BlocksAreTheWhole) {
  const auto q = random_rows(60, 4), k = random_rows(60, 2), v = random_rows(60, 2);
  AttentionOptions options;
  options.is_causal = true;
  const std::vector<at::Tensor> leaves = {q.clone().requires_grad_(), k.clone().requires_grad_(),
                                          v.clone().requires_grad_()};
  const auto [whole, whole_lse] =
      attention(leaves[0], leaves[1], leaves[2], {16, 40}, {1, 3}, options);
  const auto grad_out = at::randn_like(q), grad_lse = at::randn_like(whole_lse);
  const auto expected = torch::autograd::grad({whole, whole_lse}, leaves, {grad_out, grad_lse});

  AttentionBlock block{60, {10}, {0}};  // of the queries, those from 10 on
  for (const auto& [begin, end] : {std::pair(25, 60), std::pair(0, 25)}) {
    block.keys = {begin};
    block.partial = begin != 0;
    std::tie(block.out, block.lse) =
        attention_block(q.slice(1, 10), k.slice(1, begin, end), v.slice(1, begin, end), block,
                        {16, 40}, {1, 3}, options);
  }
  expect_close(*block.out, whole.detach().slice(1, 10));
  expect_close(*block.lse, whole_lse.detach().slice(2, 10));
  const auto share = [&](int64_t begin, int64_t end) {
    return attention_block_backward(
        grad_out.slice(1, begin, end), grad_lse.slice(2, begin, end), q.slice(1, begin, end), k, v,
        whole.detach().slice(1, begin, end), whole_lse.detach().slice(2, begin, end),
        {60, {begin}, {0}}, {16, 40}, {1, 3}, options);
  };
  const auto [first_query, first_key, first_value] = share(0, 10);
  const auto [second_query, second_key, second_value] = share(10, 60);
  expect_close(at::cat({first_query, second_query}, 1), expected[0]);
  expect_close(first_key + second_key, expected[1]);
  expect_close(first_value + second_value, expected[2]);
  EXPECT_THROW(attention_block_backward(q, std::nullopt, q, k, v, q, whole_lse, block, {16}, {1}),
               c10::ValueError);
}

TEST(SegmentAttention, IsAttentionWithOneBranch) {
  const auto q = random_rows(50, 4), k = random_rows(50, 2), v = random_rows(50, 2);
  AttentionOptions options;
  options.is_causal = true;
  options.padding = "zeros";
  options.head_offsets = at::tensor({1, 0, 1, -1}, at::kLong).view({1, 4});
  const auto [out, lse] = segment_attention(q, k, v, 16, 2, options);
  const auto [expected_out, expected_lse] = attention(q, k, v, {16}, {2}, options);
  EXPECT_TRUE(at::equal(out, expected_out));
  EXPECT_TRUE(at::equal(lse, expected_lse));
}

TEST(Attention, TakesAPlannedPatternOfItsOwnSpecificationOnly) {
  const auto x = random_rows(60, 2);
  PatternSpec spec;
  spec.seq_len = 60;
  spec.branches = {{16, 1}, {60, 2}};
  spec.heads = spec.kv_heads = 2;
  const std::vector<int32_t> words = plan(spec);
  AttentionOptions options;
  options.pattern = at::tensor(words, at::kInt);
  const auto planned = attention(x, x, x, {16, 60}, {1, 2});
  EXPECT_TRUE(
      at::equal(std::get<0>(attention(x, x, x, {16, 60}, {1, 2}, options)), std::get<0>(planned)));
  EXPECT_THROW(attention(x, x, x, {16, 32}, {1, 2}, options), c10::ValueError);
}

TEST(PlannedPatterns, AreFoundByEqualCalls) {
  clear_planned_patterns();
  const auto x = random_rows(60, 2).requires_grad_();
  for (int call = 0; call < 2; ++call) {
    const auto [out, lse] = attention(x, x, x, {16, 60}, {1, 2});
    torch::autograd::grad({out.sum()}, {x});
  }
  attention(x, x, x, {16, 32}, {1, 2});
  PlannedPatternCounts counts = planned_pattern_counts();
  EXPECT_EQ(counts.misses, 2);
  EXPECT_EQ(counts.hits, 3);
  EXPECT_EQ(counts.entries, 2);
  EXPECT_GT(counts.bytes, 0);
  EXPECT_THROW(resize_planned_patterns(-1, 0), std::invalid_argument);
  resize_planned_patterns(1, int64_t{256} << 20);
  counts = planned_pattern_counts();
  EXPECT_EQ(counts.entries, 1);
  EXPECT_EQ(counts.evictions, 1);
  resize_planned_patterns(128, int64_t{256} << 20);
}

TEST(Gather, KeepsTheLattice) {
  const auto x = at::arange(10, at::kFloat).view({1, 10, 1, 1});
  const auto offset = at::tensor({1}, at::kLong);
  // Segments of 6 cut [2, 12) at 6, pieces of 4 and 6 positions: slots for 2, 5 | 7, 10 (offset 1).
  const auto packed = gather(x, 6, 3, offset, 2).flatten();
  EXPECT_TRUE(at::equal(packed, at::tensor({2.f, 0.f, 5.f, 8.f}))) << packed;
}

TEST(ScatterAdd, IsTheTransposeOfGather) {
  const auto x = random_rows(45, 3), base = random_rows(45, 3);
  const auto packed = gather(x, 16, 3, std::nullopt, 5);
  const auto y = at::randn_like(packed);
  const auto scattered = scatter_add(base, y, 16, 3, std::nullopt, 5) - base;
  expect_close((packed * y).sum(), (x * scattered).sum());
}

TEST(Errors, NameTheArgument) {
  const auto x = random_rows(20, 2);
  try {
    attention(x, x, x, {16, 32}, {1});
    FAIL() << "nothing was thrown";
  } catch (const c10::ValueError& error) {
    EXPECT_NE(std::string(error.what()).find("dilation_rates"), std::string::npos) << error.what();
  }
}

void expect_error(const at::Tensor& query, std::optional<double> scale, const std::string& said) {
  AttentionOptions options;
  options.scale = scale;
  try {
    attention(query, query, query, {16}, {1}, options);
    FAIL() << "nothing was thrown";
  } catch (const c10::ValueError& error) {
    EXPECT_NE(std::string(error.what()).find(said), std::string::npos) << error.what();
  }
}

TEST(Errors, SpellDtypesAsPythonDoes) {
  expect_error(at::zeros({1, 20, 2, 16}, at::kInt), std::nullopt, "got int32");
  expect_error(at::zeros({1, 20, 2, 16}, at::kFloat), 1e39, "scale: must be finite in float32");
  expect_error(at::Tensor(), std::nullopt, "query: must be a tensor, got None");
}

TEST(Ops, NearAndFarKeysAreOneSoftmax) {
  const auto q = at::randn({2, 20, 4, 8}, at::kDouble), k = at::randn({2, 60, 2, 8}, at::kDouble),
             v = at::randn_like(k);
  const AttentionBlock whole{60, {10}, {0}};
  const auto [expected, expected_lse] = attention_block(q, k, v, whole, {16, 60}, {1, 3});
  const auto out = at::empty_like(q), lse = at::empty_like(expected_lse);
  const AttentionBlock near{60, {10}, {10, 30}};
  FarKeys far{at::cat({k.slice(1, 0, 10), k.slice(1, 30)}, 1),
              at::cat({v.slice(1, 0, 10), v.slice(1, 30)}, 1),
              {0, 10, 30, 60}};
  for (const char* rows : {"near", "far"}) {
    far.rows = rows;
    attention_block_into(out, lse, q, k.slice(1, 10, 30), v.slice(1, 10, 30), far, near, {16, 60},
                         {1, 3});
  }
  expect_close(out, expected);
  expect_close(lse, expected_lse);
  far.keys = {9, 19, 30, 60};
  EXPECT_THROW(attention_block_into(out, lse, q, k.slice(1, 10, 30), v.slice(1, 10, 30), far, near,
                                    {16, 60}, {1, 3}),
               c10::ValueError);
}

}  // namespace
}  // namespace dilated

#include "kernels/cuda/decode/choose.h"

#include <algorithm>

namespace dilated::kernels::cuda::decode {
namespace {

// A block of fewer rows spends its time on starting and on being combined, and so do more blocks
// than run at once.
constexpr int64_t kLeastRows = 128, kBlocksOfMultiprocessor = 2;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Choice choose(const Problem& problem, const Device& device) {
  const bool is_16_bit = problem.dtype == Dtype::kFloat16 || problem.dtype == Dtype::kBFloat16;
  const bool has_products = is_16_bit && problem.is_aligned && problem.head_dim % 8 == 0;
  Choice choice{};
  choice.family = has_products ? Family::kTensorCores : Family::kScalar;
  choice.width = static_cast<int32_t>(divide_up(problem.head_dim, 64) * 64);
  const int64_t group = problem.heads / problem.kv_heads;
  choice.heads = static_cast<int32_t>(std::min<int64_t>(group, has_products ? 8 : 4));
  const int64_t blocks = problem.queries * problem.kv_heads * divide_up(group, choice.heads);
  const int64_t wanted =
      kBlocksOfMultiprocessor * device.multiprocessors / std::max<int64_t>(1, blocks);
  const int64_t most = std::min<int64_t>(kMostSplits, divide_up(problem.rows, kLeastRows));
  choice.splits = static_cast<int32_t>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, most)));
  choice.overlaps = device.compute_capability >= 90;
  return choice;
}

int64_t most_rows(const DecodeAttendArgs& args) {
  int64_t rows = 0;
  for (int32_t branch = 0; branch < args.branches; ++branch) {
    const int64_t w = args.segment_lengths[branch], r = args.dilation_rates[branch];
    const int64_t of_segment = divide_up(w, r);
    rows += std::min(of_segment, args.forgets ? args.rows : divide_up(args.rows, r));
  }
  return rows;
}

}  // namespace dilated::kernels::cuda::decode

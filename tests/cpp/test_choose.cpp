// Which kernels run a call on which GPU, and with how much memory.
#include <gtest/gtest.h>

#include <cstdint>
#include <ostream>
#include <tuple>
#include <vector>

#include "kernels/cuda/choose.h"

namespace dilated::kernels::cuda {
namespace {

constexpr size_t kKibi = 1024;
constexpr Device kA100{80, 108, 163 * kKibi, false}, kA10{86, 72, 99 * kKibi, false},
    kL40S{89, 142, 99 * kKibi, false}, kH100{90, 132, 227 * kKibi, true},
    kRtx5090{120, 170, 99 * kKibi, false};
constexpr Device kDevices[] = {kA100, kA10, kL40S, kH100, kRtx5090};
constexpr Dtype kDtypes[] = {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32};

Problem problem(int64_t head_dim, bool is_causal = false, bool is_deterministic = false) {
  return {Dtype::kBFloat16, head_dim, is_causal, is_deterministic};
}

/// Of the whole sequence, in rows that tensor maps can describe.
constexpr int64_t kRates[] = {1, 2, 4};
ForwardProblem forward_problem(const Problem& problem) {
  return {problem, /*rows=*/1 << 20, /*is_mappable=*/true, kRates};
}
/// That only portable kernels can run.
ForwardProblem unmappable(const Problem& problem) {
  return {problem, /*rows=*/1 << 20, /*is_mappable=*/false, kRates};
}

BackwardProblem unmappable_backward(const Problem& problem) {
  return {problem, /*is_mappable=*/false, kRates};
}

/// What the tests below compare: family, keys of a block, stages.
using Kernel = std::tuple<Family, int32_t, int32_t>;
Kernel backward(int64_t head_dim, const Device& device) {
  const BackwardChoice choice = choose_backward(unmappable_backward(problem(head_dim)), device);
  return {choice.family, choice.tile.rows, choice.stages};
}

TEST(Choose, EveryCallFitsOnEveryDevice) {
  for (const Device& device : kDevices) {
    for (const Dtype dtype : kDtypes) {
      for (int64_t head_dim = 1; head_dim <= 256; ++head_dim) {
        for (const bool is_causal : {false, true}) {
          const Problem problem{dtype, head_dim, is_causal, /*is_deterministic=*/false};
          const ForwardChoice best = choose_forward(forward_problem(problem), device);
          EXPECT_LE(best.shared_bytes, device.shared_bytes);
          const ForwardChoice any = choose_forward(unmappable(problem), device);
          EXPECT_LE(any.shared_bytes, kLeastSharedBytes);
          for (const ForwardChoice& forward : {best, any}) {
            EXPECT_GE(forward.width, head_dim);
            EXPECT_EQ(forward.row_tile, 64);
          }
          const BackwardChoice backward = choose_backward(unmappable_backward(problem), device);
          EXPECT_GE(backward.width, head_dim);
          EXPECT_LE(backward.shared_bytes, device.shared_bytes);
          EXPECT_EQ(backward.row_tile, 64);
        }
      }
    }
  }
}

TEST(Choose, Float32RunsWithoutTensorCores) {
  for (const Device& device : kDevices) {
    for (const int64_t head_dim : {1, 64, 256}) {
      const Problem problem{Dtype::kFloat32, head_dim, false, false};
      EXPECT_EQ(choose_forward(forward_problem(problem), device).family, Family::kScalar);
      const BackwardChoice backward = choose_backward(unmappable_backward(problem), device);
      EXPECT_EQ(backward.family, Family::kScalar);
      EXPECT_EQ(backward.sums_width, 0);
      EXPECT_EQ(backward.max_blocks, 0);
    }
  }
}

TEST(Choose, ShortGroupsTakeShortTilesUpToAWidth) {
  for (const Device& device : kDevices) {
    for (const bool is_deterministic : {false, true}) {
      for (const int64_t head_dim : {1, 48, 64, 65, 128, 129, 256}) {
        Problem short_groups = problem(head_dim, false, is_deterministic);
        short_groups.row_tile = kShortRowTile;
        const ForwardProblem forward = forward_problem(short_groups);
        const BackwardProblem backward{short_groups, /*is_mappable=*/true, kRates};
        const ForwardChoice choice = choose_forward(forward, device);
        const BackwardChoice back = choose_backward(backward, device);
        EXPECT_EQ(choice.tile.rows == kShortRowTile, head_dim <= 128);
        EXPECT_EQ(back.tile.rows == kShortRowTile, head_dim <= 128);
        EXPECT_EQ(choice.row_tile, kShortRowTile);
        EXPECT_LE(choice.shared_bytes, device.shared_bytes);
        EXPECT_LE(back.shared_bytes, device.shared_bytes);
        if (head_dim <= 128) {
          EXPECT_EQ(choice.family, Family::kPortable);
          EXPECT_EQ(back.family, Family::kPortable);
          EXPECT_EQ(back.sums_width > 0, !is_deterministic);
        }
      }
    }
  }
  Problem floats{Dtype::kFloat32, 64, false, false, kShortRowTile};
  EXPECT_EQ(choose_forward(forward_problem(floats), kH100).family, Family::kScalar);
}

TEST(Choose, TheForwardTakes128RowsWhereThatMeasuredBest) {
  const auto rows = [](int64_t head_dim, bool is_causal) {
    return choose_forward(unmappable(problem(head_dim, is_causal)), kH100).tile.rows;
  };
  EXPECT_EQ(rows(48, false), 64);
  EXPECT_EQ(rows(49, false), 128);
  EXPECT_EQ(rows(64, true), 64);
  EXPECT_EQ(rows(65, true), 128);
  EXPECT_EQ(rows(128, true), 128);
  EXPECT_EQ(rows(129, false), 64);
}

TEST(Choose, FarKeysNeedMapsOfTheirOwn) {
  constexpr int64_t kFew[] = {1, 2, 4, 8, 16}, kMany[] = {1, 2, 4, 8, 16, 64};
  const auto family = [](std::span<const int64_t> rates, bool has_far_keys) {
    return choose_forward({problem(64), 1 << 20, /*is_mappable=*/true, rates, has_far_keys}, kH100)
        .family;
  };
  EXPECT_EQ(family(kFew, true), Family::kHopper);
  EXPECT_EQ(family(kMany, false), Family::kHopper);
  EXPECT_EQ(family(kMany, true), Family::kPortable);
}

TEST(Choose, HopperRunsWhatItsKernelsCan) {
  const auto family = [](ForwardProblem problem, const Device& device = kH100) {
    return choose_forward(problem, device).family;
  };
  for (const int64_t head_dim : {16, 48, 64, 80, 128, 192}) {
    for (const bool is_causal : {false, true}) {
      const ForwardProblem whole = forward_problem(problem(head_dim, is_causal));
      EXPECT_EQ(family(whole), Family::kHopper);
      for (const Device& device : {kA100, kA10, kL40S, kRtx5090}) {
        EXPECT_EQ(family(whole, device), Family::kPortable);
      }
    }
  }
  EXPECT_EQ(family(forward_problem(problem(200))), Family::kPortable);
  EXPECT_EQ(family(unmappable(problem(64))), Family::kPortable);
  Device cut = kH100;
  cut.shared_bytes = kLeastSharedBytes;
  EXPECT_EQ(family(forward_problem(problem(64)), cut), Family::kPortable);
  Device without = kH100;
  without.has_hopper = false;
  EXPECT_EQ(family(forward_problem(problem(64)), without), Family::kPortable);
}

TEST(Choose, HopperRunsTheBackwardThatItsKernelsCan) {
  const auto family = [](BackwardProblem problem, const Device& device = kH100) {
    return choose_backward(problem, device).family;
  };
  for (const int64_t head_dim : {16, 48, 64, 80, 128}) {
    for (const bool is_causal : {false, true}) {
      BackwardProblem mappable = unmappable_backward(problem(head_dim, is_causal));
      EXPECT_EQ(family(mappable), Family::kPortable);
      mappable.is_mappable = true;
      EXPECT_EQ(family(mappable), Family::kHopper);
      EXPECT_EQ(choose_backward(mappable, kH100).sums_width, (head_dim + 15) / 16 * 16);
      EXPECT_EQ(family(mappable, kA100), Family::kPortable);
      mappable.is_deterministic = true;
      EXPECT_EQ(family(mappable), Family::kPortable);
    }
  }
  EXPECT_EQ(family({problem(192), /*is_mappable=*/true, kRates}), Family::kPortable);
}

TEST(Choose, BlocksCountTilesWhereTheyTakeSeveral) {
  ForwardProblem problem = forward_problem({Dtype::kBFloat16, 64, true, false});
  EXPECT_TRUE(choose_forward(problem, kH100).has_counter);
  problem.rows = 128 * kH100.multiprocessors;
  EXPECT_FALSE(choose_forward(problem, kH100).has_counter);
  EXPECT_FALSE(choose_forward(forward_problem({Dtype::kFloat32, 64}), kH100).has_counter);
}

TEST(Choose, KeysLieAtStridesThatDivideTheCommonPeriod) {
  const auto strides = [](std::vector<int64_t> rates) {
    ForwardProblem problem = forward_problem({Dtype::kBFloat16, 64, false, false});
    problem.dilation_rates = rates;
    const ListStrides found = choose_forward(problem, kH100).strides;
    return std::vector<int32_t>(found.stride, found.stride + found.count);
  };
  EXPECT_EQ(strides({1}), (std::vector{1}));
  EXPECT_EQ(strides({1, 2, 4, 8, 16}), (std::vector{1, 2, 4, 8, 16}));
  EXPECT_EQ(strides({3, 5}), (std::vector{1, 3, 5, 15}));
  EXPECT_EQ(strides({1, 16, 256}), (std::vector{1, 2, 4, 8, 16, 32, 64, 128, 256}));
  // Too many, or too far apart: the portable kernels need none.
  EXPECT_EQ(strides({5, 7, 8, 9}), std::vector<int32_t>());
  EXPECT_EQ(strides({1, int64_t{1} << 40}), std::vector<int32_t>());
}

TEST(Choose, WidthsAreTheNarrowestThatAreCompiled) {
  const auto widths = [](int64_t head_dim) {
    return std::pair(choose_forward(unmappable(problem(head_dim)), kH100).width,
                     choose_backward(unmappable_backward(problem(head_dim)), kH100).width);
  };
  EXPECT_EQ(widths(1), std::pair(32, 32));
  EXPECT_EQ(widths(33), std::pair(48, 48));
  EXPECT_EQ(widths(64), std::pair(64, 64));
  EXPECT_EQ(widths(65), std::pair(96, 96));
  EXPECT_EQ(widths(97), std::pair(128, 128));
  EXPECT_EQ(widths(129), std::pair(192, 256));
  EXPECT_EQ(widths(256), std::pair(256, 256));
}

TEST(Choose, TheBackwardShrinksWithSharedMemory) {
  const Family portable = Family::kPortable;
  EXPECT_EQ(backward(48, kH100), Kernel(portable, 128, 2));
  EXPECT_EQ(backward(64, kH100), Kernel(portable, 128, 2));
  EXPECT_EQ(backward(96, kH100), Kernel(portable, 128, 2));
  EXPECT_EQ(backward(128, kH100), Kernel(portable, 128, 2));
  EXPECT_EQ(backward(256, kH100), Kernel(portable, 64, 2));
  EXPECT_EQ(backward(48, kA100), Kernel(portable, 128, 2));
  EXPECT_EQ(backward(64, kA100), Kernel(portable, 128, 1));
  EXPECT_EQ(backward(96, kA100), Kernel(portable, 128, 2));
  EXPECT_EQ(backward(128, kA100), Kernel(portable, 128, 1));
  EXPECT_EQ(backward(256, kA100), Kernel(portable, 64, 1));
  for (const Device& device : {kA10, kL40S, kRtx5090}) {
    EXPECT_EQ(backward(64, device), Kernel(portable, 128, 2));
    EXPECT_EQ(backward(96, device), Kernel(portable, 64, 2));
    EXPECT_EQ(backward(128, device), Kernel(portable, 64, 1));
    EXPECT_EQ(backward(129, device), Kernel(Family::kScalar, 8, 1));
  }
}

TEST(Choose, OnlyWhatIsSummedInAnyOrderHasSums) {
  for (const Device& device : kDevices) {
    for (const int64_t head_dim : {1, 17, 64, 128, 200}) {
      const BackwardChoice sums = choose_backward(unmappable_backward(problem(head_dim)), device);
      const bool is_portable = sums.family == Family::kPortable;
      EXPECT_EQ(sums.sums_width, is_portable ? (head_dim + 15) / 16 * 16 : 0);
      const BackwardChoice none =
          choose_backward(unmappable_backward(problem(head_dim, false, true)), device);
      EXPECT_EQ(none.sums_width, 0);
      EXPECT_EQ(std::tuple(none.family, none.shared_bytes, none.max_blocks),
                std::tuple(sums.family, sums.shared_bytes, sums.max_blocks));
    }
  }
}

TEST(Choose, BlocksOfARingAgreeOnTheirSums) {
  for (const Device& device : kDevices) {
    for (int64_t head_dim = 1; head_dim <= 256; ++head_dim) {
      const BackwardChoice plain =
          choose_backward(unmappable_backward(problem(head_dim, false)), device);
      const BackwardChoice causal =
          choose_backward(unmappable_backward(problem(head_dim, true)), device);
      EXPECT_EQ(plain.family, causal.family);
      EXPECT_EQ(plain.sums_width, causal.sums_width);
    }
  }
}

TEST(Choose, BlocksThatShareAMultiprocessorAreLaunchedTogether) {
  EXPECT_EQ(choose_backward(unmappable_backward(problem(64)), kH100).max_blocks, 2 * 132);
  EXPECT_EQ(choose_backward(unmappable_backward(problem(128)), kH100).max_blocks, 132);
}

TEST(Choose, LessSharedMemoryIsANumberAndEnough) {
  EXPECT_EQ(parse_shared_bytes("101376"), 101376u);
  EXPECT_EQ(parse_shared_bytes("166912"), 166912u);
  for (const char* wrong : {"", "1000", "101375", "99KiB", "-1", " 101376", "101376 "}) {
    EXPECT_EQ(parse_shared_bytes(wrong), std::nullopt) << wrong;
  }
}

}  // namespace
}  // namespace dilated::kernels::cuda

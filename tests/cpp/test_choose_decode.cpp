// Which kernel attends a step of decoding, and over how many blocks.
#include <gtest/gtest.h>

#include "kernels/cuda/decode/choose.h"

namespace dilated::kernels::cuda::decode {
namespace {

constexpr Device kA10{86, 72, 99 * 1024, false}, kH200{90, 132, 227 * 1024, true};

/// 32 heads of 128 over 8 KV heads, segments of 2048 to 32768.
Problem problem(int64_t queries, int64_t head_dim = 128) {
  return {Dtype::kBFloat16, head_dim, /*is_aligned=*/true, queries, 32, 8, /*rows=*/10240};
}

TEST(ChooseDecode, TensorCoresTakeAligned16BitRows) {
  for (int64_t head_dim = 1; head_dim <= 256; ++head_dim) {
    for (const bool is_aligned : {false, true}) {
      for (const Dtype dtype : {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32}) {
        Problem any = problem(1, head_dim);
        any.dtype = dtype;
        any.is_aligned = is_aligned;
        const Choice choice = choose(any, kH200);
        const bool fits = is_aligned && dtype != Dtype::kFloat32 && head_dim % 8 == 0;
        EXPECT_EQ(choice.family, fits ? Family::kTensorCores : Family::kScalar);
        EXPECT_GE(choice.width, head_dim);
        EXPECT_LE(choice.width, 256);
        EXPECT_EQ(choice.width % 64, 0);
      }
    }
  }
}

TEST(ChooseDecode, HeadsOfOneKvHeadShareABlock) {
  Problem many = problem(1);
  EXPECT_EQ(choose(many, kH200).heads, 4);
  many.heads = 128;
  EXPECT_EQ(choose(many, kH200).heads, 8);
  many.dtype = Dtype::kFloat32;
  EXPECT_EQ(choose(many, kH200).heads, 4);
  many.heads = many.kv_heads;
  EXPECT_EQ(choose(many, kH200).heads, 1);
}

TEST(ChooseDecode, FewTextsAreSplitOverAllMultiprocessors) {
  for (const Device& device : {kA10, kH200}) {
    const Choice one = choose(problem(1), device);
    EXPECT_GT(8 * one.splits, device.multiprocessors);
    EXPECT_LE(8 * one.splits, 2 * device.multiprocessors);  // all run at once
    EXPECT_LE(one.splits, kMostSplits);
    const Choice batch = choose(problem(32), device);
    EXPECT_LT(batch.splits, one.splits);
    EXPECT_GE(32 * 8 * batch.splits, device.multiprocessors);
  }
  EXPECT_EQ(choose(problem(100000), kH200).splits, 1);
}

TEST(ChooseDecode, LaunchesOverlapWhereTheDeviceCan) {
  EXPECT_FALSE(choose(problem(1), kA10).overlaps);
  EXPECT_TRUE(choose(problem(1), kH200).overlaps);
}

TEST(ChooseDecode, FewRowsAreNotSplit) {
  Problem few = problem(1);
  for (const int64_t rows : {0, 1, 100}) {
    few.rows = rows;
    EXPECT_EQ(choose(few, kH200).splits, 1);
  }
}

TEST(ChooseDecode, ADivisorTellsItsMultiples) {
  for (const uint32_t number : {1u, 2u, 3u, 5u, 6u, 16u, 48u, 1000u, 65536u, 2147483647u}) {
    const Divisor divisor = make_divisor(number);
    for (uint32_t n = 0; n < 3000; ++n) {
      EXPECT_EQ(divisor.divides(n), n % number == 0) << n << " by " << number;
      const uint32_t large = 2147483647u - n;
      EXPECT_EQ(divisor.divides(large), large % number == 0) << large << " by " << number;
    }
  }
}

TEST(ChooseDecode, RowsAreCountedByBranch) {
  DecodeAttendArgs args{};
  args.branches = 3;
  args.segment_lengths[0] = 16;
  args.segment_lengths[1] = 100;
  args.segment_lengths[2] = int64_t{1} << 62;
  args.dilation_rates[0] = 1;
  args.dilation_rates[1] = 3;
  args.dilation_rates[2] = 4;
  args.rows = 1000;
  EXPECT_EQ(most_rows(args), 16 + 34 + 250);
  args.forgets = true;
  EXPECT_EQ(most_rows(args), 16 + 34 + 1000);
}

}  // namespace
}  // namespace dilated::kernels::cuda::decode

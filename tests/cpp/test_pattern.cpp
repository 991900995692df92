// The planner: a pattern's words, read back as pattern_layout.h says, hold the pairs of the
// definition; bad specifications are refused by name.
#include <dilated/pattern.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <ostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace dilated {
namespace {

PatternSpec make_spec(int64_t seq_len, const std::vector<int64_t>& lengths,
                      const std::vector<int64_t>& rates, int64_t heads = 2, int64_t kv_heads = 2) {
  PatternSpec spec;
  spec.seq_len = seq_len;
  for (size_t i = 0; i < lengths.size(); ++i) {
    spec.branches.push_back({lengths[i], rates[i], interleaved_offsets(rates[i], heads)});
  }
  spec.heads = heads;
  spec.kv_heads = kv_heads;
  spec.row_tile = 16;
  return spec;
}

void PrintTo(const PatternSpec& spec, std::ostream* out) {
  *out << "seq_len " << spec.seq_len << ", causal " << spec.is_causal << ", branches";
  for (const Branch& branch : spec.branches) {
    *out << ' ' << branch.segment_length << '/' << branch.dilation_rate;
  }
}

/// How many branches hold (query, key) of a head, for all of them: [heads][seq_len][seq_len].
using Counts = std::vector<int>;

Counts defined_counts(const PatternSpec& spec) {
  Counts counts;
  for (int64_t head = 0; head < spec.heads; ++head) {
    for (int64_t p = 0; p < spec.seq_len; ++p) {
      for (int64_t t = 0; t < spec.seq_len; ++t) {
        int count = 0;
        for (const auto& [w, r, offsets] : spec.branches) {
          const int64_t offset = offsets[head];
          count += p / w == t / w && p % w % r == offset && t % w % r == offset;
        }
        counts.push_back(spec.is_causal && t > p ? 0 : count);
      }
    }
  }
  return counts;
}

/// Positions of a list of runs, with the run that each is from.
struct Place {
  int32_t position;
  const Run* run;
};

std::vector<Place> places(const Run* runs, int32_t count, int32_t origin) {
  std::vector<Place> all;
  for (const Run* run = runs; run != runs + count; ++run) {
    for (int32_t j = 0; j < run->count; ++j) {
      all.push_back({origin + run->start + run->stride * j, run});
    }
  }
  return all;
}

/// What one direction of the pattern holds, causal pairs only if the specification is causal.
Counts planned_counts(const PatternSpec& spec, const TableView& table, bool transposed) {
  const int64_t n = spec.seq_len, sharing = spec.heads / spec.kv_heads;
  Counts counts(spec.heads * n * n);
  for (int32_t i = 0; i < table.table->tiles; ++i) {
    const Tile& tile = table.tiles()[i];
    const Group& group = table.groups()[tile.group];
    const auto rows = places(table.runs() + group.row_runs, group.row_run_count, tile.origin);
    const auto columns =
        places(table.runs() + group.column_runs, group.column_run_count, tile.origin);
    const int32_t* first_head = table.class_begin() + group.head_class;
    for (int32_t slot = first_head[0]; slot < first_head[1]; ++slot) {
      const int32_t head = table.class_heads()[slot];
      for (int32_t row = tile.first_row; row < tile.first_row + tile.rows; ++row) {
        for (const Place& column : columns) {
          const int64_t p = transposed ? column.position : rows.at(row).position;
          const int64_t t = transposed ? rows.at(row).position : column.position;
          const int64_t query_head = transposed ? head * sharing + column.run->head : head;
          if (!spec.is_causal || t <= p) {
            counts.at((query_head * n + p) * n + t) += column.run->multiplicity;
          }
        }
      }
    }
  }
  return counts;
}

std::vector<PatternSpec> specs() {
  std::vector<PatternSpec> all = {
      make_spec(64, {16, 64}, {1, 4}),          // everything divides
      make_spec(61, {16, 48, 100}, {1, 3, 5}),  // nothing does; the last segment is clipped
      make_spec(40, {8, 24}, {12, 2}),          // a rate beyond its segment
      make_spec(3, {2, 8}, {1, 2}),             // shorter than a tile
      make_spec(50, {8, 32}, {1, 4}, 6, 2),     // three query heads share a key head
  };
  PatternSpec groups = make_spec(48, {8, 24}, {1, 2});
  groups.branches[0].head_offsets = {0, -1};  // a branch for each head
  groups.branches[1].head_offsets = {-1, 1};
  all.push_back(groups);
  for (size_t i = 0, count = all.size(); i < count; ++i) {
    all.push_back(all[i]);
    all.back().is_causal = true;
  }
  return all;
}

class Pattern : public testing::TestWithParam<PatternSpec> {};

TEST_P(Pattern, ForwardTableHoldsTheDefinition) {
  const std::vector<int32_t> words = plan(GetParam());
  const TableView table = PatternView{words.data()}.forward();
  EXPECT_EQ(planned_counts(GetParam(), table, false), defined_counts(GetParam()));
}

TEST_P(Pattern, TransposedTableHoldsTheSame) {
  const std::vector<int32_t> words = plan(GetParam());
  const TableView table = PatternView{words.data()}.transposed();
  EXPECT_EQ(planned_counts(GetParam(), table, true), defined_counts(GetParam()));
}

TEST_P(Pattern, ReportCountsPairs) {
  const PatternReport numbers = report(GetParam(), plan(GetParam()));
  int64_t nominal = 0, distinct = 0;
  for (const int count : defined_counts(GetParam())) {
    nominal += count;
    distinct += count > 0;
  }
  EXPECT_EQ(numbers.nominal, nominal);
  EXPECT_EQ(numbers.distinct, distinct);
  EXPECT_GE(numbers.computed, distinct);
}

INSTANTIATE_TEST_SUITE_P(Specs, Pattern, testing::ValuesIn(specs()));

TEST(Fingerprint, IsOfWhatThePatternDependsOn) {
  const PatternSpec spec = make_spec(64, {16, 64}, {1, 4});
  EXPECT_EQ(fingerprint(spec), fingerprint(make_spec(64, {16, 1000}, {1, 4})));  // clipped to 64
  EXPECT_NE(fingerprint(spec), fingerprint(make_spec(64, {16, 32}, {1, 4})));
  PatternSpec causal = spec;
  causal.is_causal = true;
  EXPECT_NE(fingerprint(spec), fingerprint(causal));
}

std::string complaint(const PatternSpec& spec) {
  try {
    plan(spec);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(IsPlanned, NoticesEveryBit) {
  std::vector<int32_t> words = plan(make_spec(61, {16, 48}, {1, 3}));
  const auto size = static_cast<int64_t>(words.size());
  EXPECT_TRUE(is_planned(words.data(), size));
  EXPECT_FALSE(is_planned(words.data(), size - 4));
  EXPECT_FALSE(is_planned(words.data(), 0));
  for (int32_t& word : words) {
    for (uint32_t bit = 1; bit != 0; bit <<= 1) {
      const int32_t before = word;
      word = static_cast<int32_t>(static_cast<uint32_t>(word) ^ bit);
      EXPECT_FALSE(is_planned(words.data(), size));
      word = before;
    }
  }
}

TEST(MaxPatternBytes, BoundsPlanning) {
  const PatternSpec spec = make_spec(2000, {500, 2000}, {3, 7});
  const int64_t before = max_pattern_bytes();
  const auto bytes = static_cast<int64_t>(plan(spec).size() * sizeof(int32_t));
  set_max_pattern_bytes(bytes);
  EXPECT_EQ(complaint(spec), "nothing was thrown");
  set_max_pattern_bytes(bytes / 2);
  const std::string refusal = complaint(spec);
  EXPECT_EQ(refusal.find("dilation_rates: "), 0U) << refusal;
  EXPECT_NE(refusal.find(std::to_string(bytes / 2)), std::string::npos) << refusal;
  EXPECT_THROW(set_max_pattern_bytes(0), std::invalid_argument);
  set_max_pattern_bytes(before);
}

TEST(Plan, EndsWithWhatPollThrows) {
  const PatternSpec spec = make_spec(200'000, {200'000, 200'000}, {1009, 1013});
  int polls = 0;
  EXPECT_EQ(plan(spec, [&] { ++polls; }), plan(spec));
  EXPECT_GT(polls, 0);
  EXPECT_THROW(plan(spec, [] { throw std::runtime_error("interrupted"); }), std::runtime_error);
}

TEST(Validate, NamesTheField) {
  EXPECT_NE(complaint(make_spec(64, {16, 0}, {1, 4})).find("segment_lengths"), std::string::npos);
  EXPECT_NE(complaint(make_spec(64, {16}, {1}, 3, 2)).find("kv_heads"), std::string::npos);
  PatternSpec spec = make_spec(64, {16}, {1});
  spec.branches[0].head_offsets.pop_back();
  EXPECT_NE(complaint(spec).find("head_offsets"), std::string::npos);
}

}  // namespace
}  // namespace dilated

// Batches of sequences: the joined tables are those of the lengths, moved to where sequences lie.
#include <dilated/pattern.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace dilated {
namespace {

PatternSpec make_batch(int64_t rows, const std::vector<Sequence>& sequences, int64_t kv_heads = 2) {
  PatternSpec spec;
  spec.seq_len = rows;
  spec.branches = {{16, 1}, {40, 3}};
  spec.heads = 4;
  spec.kv_heads = kv_heads;
  spec.row_tile = 8;
  spec.sequences = sequences;
  return spec;
}

/// (place, position) of a row or a column.
using Spot = std::tuple<int32_t, int32_t>;

std::vector<Spot> spots(const Run* runs, int32_t count, int32_t origin, const int32_t* shifts) {
  std::vector<Spot> all;
  for (const Run* run = runs; run != runs + count; ++run) {
    for (int32_t j = 0; j < run->count; ++j) {
      const int32_t position = origin + run->start + run->stride * j;
      all.emplace_back(position + shifts[run->stretch], position);
    }
  }
  return all;
}

/// A tile as a kernel sees it, `first` rows further on.
struct Seen {
  int32_t head_class, first_row, rows, zero_keys;
  std::vector<Spot> row_spots, column_spots;
  bool operator==(const Seen&) const = default;
};

Seen see(const TableView& table, const Tile& tile, int32_t first) {
  const Group& group = table.groups()[tile.group];
  const int32_t row_shift = tile.row_shift + first;
  const std::vector<int32_t> shifts{table.shifts()[tile.first_stretch] + first};
  return {
      group.head_class,
      tile.first_row,
      tile.rows,
      group.zero_keys,
      spots(table.runs() + group.row_runs, group.row_run_count, tile.origin, &row_shift),
      spots(table.runs() + group.column_runs, group.column_run_count, tile.origin, shifts.data())};
}

void expect_sequences(const TableView& joined, const PatternSpec& batch,
                      TableView (PatternView::*direction)() const) {
  int32_t at = 0, spans = 0;
  for (const int64_t length : sequence_lengths(batch)) {
    const std::vector<int32_t> words = plan(one_sequence(batch, length));
    const TableView alone = (PatternView{words.data()}.*direction)();
    for (size_t i = 0; i < batch.sequences->size(); ++i) {
      const auto [first, own] = (*batch.sequences)[i];
      if (own != length || length == 0) {
        continue;
      }
      for (int32_t t = 0; t < alone.table->tiles; ++t, ++at) {
        const Tile& tile = joined.tiles()[at];
        EXPECT_EQ(tile.sequence, static_cast<int32_t>(i));
        EXPECT_EQ(see(joined, tile, 0), see(alone, alone.tiles()[t], static_cast<int32_t>(first)));
      }
      spans += alone.table->spans;
      EXPECT_EQ(joined.span_tiles()[spans], at);
    }
  }
  EXPECT_EQ(joined.table->tiles, at);
  EXPECT_EQ(joined.table->spans, spans);
}

TEST(Join, SequencesHaveTheTablesOfTheirLengths) {
  const std::vector<std::vector<Sequence>> lists = {
      {},
      {{0, 0}, {3, 0}},
      {{0, 70}},
      {{1, 20}, {21, 0}, {21, 45}, {68, 20}, {99, 1}},
  };
  for (const auto& list : lists) {
    for (const int64_t kv_heads : {2, 4}) {
      for (const Padding padding : {Padding::kMasked, Padding::kZeros}) {
        PatternSpec batch = make_batch(100, list, kv_heads);
        batch.padding = padding;
        const std::vector<int32_t> words = plan(batch);
        EXPECT_TRUE(is_planned(words.data(), static_cast<int64_t>(words.size())));
        const PatternView view{words.data()};
        EXPECT_EQ(join(view.header().fingerprint), fingerprint(batch));
        EXPECT_EQ(directions_of(view.header()), 3);
        expect_sequences(view.forward(), batch, &PatternView::forward);
        expect_sequences(view.transposed(), batch, &PatternView::transposed);
      }
    }
  }
}

TEST(Join, PartsThatWerePlannedBeforeGiveTheSame) {
  const PatternSpec batch = make_batch(100, {{0, 30}, {30, 12}, {50, 30}});
  EXPECT_EQ(sequence_lengths(batch), (std::vector<int64_t>{30, 12}));
  const std::vector<int32_t> longer = plan(one_sequence(batch, 30));
  const std::vector<int32_t> shorter = plan(one_sequence(batch, 12));
  EXPECT_EQ(join_sequences(batch, {longer.data(), shorter.data()}), plan(batch));
  EXPECT_THROW(join_sequences(batch, {shorter.data(), longer.data()}), std::invalid_argument);
  EXPECT_THROW(join_sequences(batch, {longer.data()}), std::invalid_argument);
}

TEST(Join, ManyLengthsArePlannedAtOnce) {
  std::vector<Sequence> list;
  for (int64_t i = 0; i < 20; ++i) {
    list.push_back({6000 * i, 6000 - 37 * i});
  }
  const PatternSpec batch = make_batch(120'000, list);
  const std::vector<int64_t> lengths = sequence_lengths(batch);
  const std::vector<std::vector<int32_t>> planned = plan_lengths(batch, lengths);
  ASSERT_EQ(planned.size(), lengths.size());
  for (size_t i = 0; i < lengths.size(); ++i) {
    EXPECT_EQ(planned[i], plan(one_sequence(batch, lengths[i])));
  }
  EXPECT_TRUE(plan_lengths(batch, {}).empty());
  EXPECT_THROW(plan(batch, [] { throw std::runtime_error("interrupted"); }), std::runtime_error);
}

TEST(Join, TheFingerprintIsOfThePlaces) {
  const PatternSpec batch = make_batch(100, {{0, 30}, {30, 12}});
  EXPECT_NE(fingerprint(batch), fingerprint(make_batch(100, {{0, 30}, {31, 12}})));
  EXPECT_NE(fingerprint(batch), fingerprint(make_batch(100, {{0, 30}, {30, 12}, {42, 0}})));
  PatternSpec whole = make_batch(100, {{0, 100}});
  const uint64_t of_one = fingerprint(whole);
  whole.sequences.reset();
  EXPECT_NE(of_one, fingerprint(whole));
}

std::string complaint(const PatternSpec& spec) {
  try {
    plan(spec);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(Join, NamesWhatIsWrong) {
  EXPECT_EQ(complaint(make_batch(50, {{0, 30}, {29, 5}})).find("sequences: must ascend"), 0U);
  EXPECT_EQ(complaint(make_batch(50, {{0, 30}, {30, 21}})).find("sequences: must end"), 0U);
  EXPECT_EQ(complaint(make_batch(50, {{0, -1}})).find("sequences: must have lengths"), 0U);
  PatternSpec part = make_batch(50, {{0, 30}});
  part.keys = {{0, 20}};
  EXPECT_FALSE(is_whole(part));
  EXPECT_TRUE(is_planned(plan(part).data(), static_cast<int64_t>(plan(part).size())));
  EXPECT_THROW(sequence_lengths(part), std::invalid_argument);
}

}  // namespace
}  // namespace dilated

// The pattern of a batch of sequences, joined of the patterns of its lengths.
//
// Groups, runs and windows are relative to a sequence, so each length's are copied once. Tiles are
// copied for each sequence: they say where its rows and its columns lie. Sequences come whole, the
// longest first: what runs together then reads the same keys, long lists begin before short ones,
// and spans stay spans.
#pragma once

#include <dilated/pattern.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "pattern/row_tile.h"

namespace dilated::pattern {

class Joiner {
 public:
  /// The specification, which has sequences, is kept by reference. Throws as validate() does.
  explicit Joiner(const PatternSpec& spec);

  /// sequence_lengths().
  const std::vector<int64_t>& lengths() const { return lengths_; }

  /// The words of the next of the lengths, kept by reference. Throws std::invalid_argument where
  /// they are not that, or the batch's pattern would be larger than max_pattern_bytes().
  void add(const int32_t* words);

  /// The batch's words, after the last part.
  std::vector<int32_t> join() const;

 private:
  /// A sequence that has rows.
  struct Placed {
    size_t part;              // of lengths()
    int32_t sequence, first;  // its index in the list, its first row
  };
  /// What the parts' tables before one hold.
  struct Before {
    int32_t groups, runs, windows;
  };
  /// A part in one direction, its tiles perhaps cut again.
  struct Part : TableView {
    std::span<const Tile> cut;
    std::span<const int32_t> cut_spans;
    TileList again{};  // what holds them then
  };
  using Parts = std::vector<Part>;

  using Direction = TableView (PatternView::*)() const;

  Parts cut_parts(Direction direction, int64_t& planned, Table& table) const;
  Table join(Direction direction, int64_t& planned, std::vector<int32_t>& words) const;
  int32_t append_spans(const Parts& parts, std::vector<int32_t>& words) const;
  int32_t append_tiles(const Parts& parts, const std::vector<Before>& before,
                       std::vector<int32_t>& words) const;
  void check_words(int64_t words) const;

  const PatternSpec& spec_;
  PatternSpec one_;  // one_sequence(), of the length at hand
  std::vector<int64_t> lengths_;
  std::vector<int64_t> counts_;  // sequences of each length
  std::vector<Placed> placed_;   // the longest first, then in the list's order
  std::vector<PatternView> parts_;
  int64_t words_;  // of the joined pattern so far, at most
};

}  // namespace dilated::pattern

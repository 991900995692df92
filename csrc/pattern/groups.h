// Groups: the rows of a cell that are in the same branches, and the columns that they meet.
#pragma once

#include <dilated/pattern.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "pattern/budget.h"
#include "pattern/cells.h"
#include "pattern/sieve.h"

namespace dilated::pattern {

/// Row heads whose rows have the same columns. offsets[g * branches + i]: column head g of the row
/// head's group in branch i. Forward: one column head. Transposed: the query heads that share the
/// KV head.
struct HeadClass {
  std::vector<int64_t> offsets;
  std::vector<int32_t> heads;
};

/// `column_heads` consecutive heads of the specification share a row head. Throws
/// std::invalid_argument where they are on more lattices than a row's code has bits.
std::vector<HeadClass> classify_heads(const PatternSpec& spec, int64_t column_heads);

/// Branches as they act on a sequence of the specification's length.
struct BranchShape {
  int64_t segment_length;  // clipped to the sequence
  int64_t dilation_rate;
};

/// Plans the groups of cells, and keeps them all: Group's run indices count through runs().
class GroupPlanner {
 public:
  /// `counts_zeros`: groups get the keys of score 0 that padding="zeros" adds.
  GroupPlanner(std::vector<BranchShape> branches, bool counts_zeros, Budget& budget)
      : branches_(std::move(branches)),
        counts_zeros_(counts_zeros),
        budget_(budget),
        row_sieve_(budget),
        column_sieve_(budget) {}

  /// Appends the groups of a cell for a class of heads, those with the longest column lists first;
  /// their rows are all the rows of the cell.
  void plan(const CellKind& kind, const HeadClass& heads, int32_t head_class);

  const std::vector<Group>& groups() const { return groups_; }
  const std::vector<Run>& runs() const { return runs_; }

 private:
  void find_lattices(const CellKind& kind, const HeadClass& heads);
  void add_group(const CellKind& kind, const HeadClass& heads, const Part& part, Group group);
  void add_columns(const CellKind& kind, const int64_t* offsets, int32_t head, Group& group);
  void add_interval(const CellKind& kind, const int64_t* offsets, int32_t head, int64_t lo,
                    int64_t hi, Group& group);
  void add_column_run(const Run& run, Group& group);
  void find_members(const CellKind& kind, const int64_t* offsets, int64_t row);
  int64_t zero_keys(const CellKind& kind, const int64_t* offsets) const;

  const std::vector<BranchShape> branches_;
  const bool counts_zeros_;
  Budget& budget_;
  std::vector<Group> groups_;
  std::vector<Run> runs_;

  // Scratch, kept to spare allocations.
  Sieve row_sieve_, column_sieve_;
  std::vector<Lattice> lattices_, active_;
  std::vector<uint64_t> weights_;
  std::vector<int64_t> boundaries_;
  std::vector<size_t> members_;  // the branches that the row at hand is in
};

}  // namespace dilated::pattern

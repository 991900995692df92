// Groups: the rows of a cell that are in the same branches, and the columns that they meet.
#pragma once

#include <dilated/pattern_layout.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <unordered_map>
#include <vector>

#include "pattern/budget.h"
#include "pattern/cells.h"
#include "pattern/heads.h"
#include "pattern/resolved.h"
#include "pattern/sieve.h"

namespace dilated::pattern {

/// The groups of a table's cells; Group's run indices count through `runs`, which several groups
/// may share.
struct Lists {
  std::vector<Group> groups;
  std::vector<Run> runs;
};

/// Memory that is used from table to table.
struct Scratch {
  Lists lists;
  SieveMemory rows, columns;
  std::array<HeadClasses, 2> classes;  // of the forward and of the transposed table
};

/// Plans the groups of cells.
class GroupPlanner {
 public:
  /// `counts_zeros`: groups get the keys of score 0 that padding="zeros" adds. Specification,
  /// budget and scratch, whose lists are appended to, are kept by reference.
  GroupPlanner(const ResolvedSpec& spec, bool counts_zeros, Budget& budget, Scratch& scratch)
      : spec_(spec),
        counts_zeros_(counts_zeros),
        budget_(budget),
        lists_(scratch.lists),
        rows_(Sieve::Code::kWhich, budget, scratch.rows),
        columns_(Sieve::Code::kHowMany, budget, scratch.columns) {}

  /// Appends the groups of a cell for a class of heads, those with the longest column lists first;
  /// their rows are all the rows of the cell. `number`: of the kind.
  void plan(const CellKind& kind, int32_t number, const HeadClass& heads, int32_t head_class);

 private:
  /// Where a lattice's segment begins or ends within a stretch of columns; sets of lattices are
  /// bits.
  struct Edge {
    int64_t at;
    uint64_t cuts;    // the lattice
    uint64_t covers;  // those whose segments hold the columns from here to the next edge
    uint8_t stretch;
  };
  /// What decides which columns a row of one head sees.
  struct Seen {
    int32_t kind;
    uint64_t lattices;  // HeadClass::bits_of_all
    bool operator==(const Seen&) const = default;
  };
  struct SeenHash {
    size_t operator()(const Seen& seen) const {
      return (seen.lattices + static_cast<uint64_t>(seen.kind) * 0x9e3779b97f4a7c15ull) *
                 0xbf58476d1ce4e5b9ull >>
             16;
    }
  };

  void look_around(const CellKind& kind, const HeadClass& heads);
  void add_edges(const CellKind& kind, const HeadClass& heads, size_t stretch);
  void add_group(const Split& rows, const Part& part, int32_t kind, const HeadClass& heads,
                 Group group);
  void add_all_columns(uint64_t row, const HeadClass& heads, Group& group);
  void repeat_runs(size_t begin, size_t end);
  int32_t count_columns(int64_t columns, size_t first, size_t head);
  void add_columns(uint64_t lattices);
  void add_interval(uint64_t lattices, const Edge& from, int64_t to);

  const ResolvedSpec& spec_;
  const bool counts_zeros_;
  Budget& budget_;
  Lists& lists_;

  // Of the cell and the class at hand.
  std::vector<Lattice> lattices_;  // relative to the cell's first position
  std::vector<int64_t> zeros_;     // keys that each lattice adds to a row's
  std::vector<Edge> edges_;        // by stretch and position

  // A group of each that was planned: other classes of heads have the same columns.
  std::pmr::monotonic_buffer_resource memory_;
  std::pmr::unordered_map<Seen, Group, SeenHash> seen_{&memory_};

  Sieve rows_, columns_;
  std::vector<Lattice> active_;
};

}  // namespace dilated::pattern

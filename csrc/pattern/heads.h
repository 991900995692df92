// Classes: row heads whose rows have the same columns, since their offsets agree in every branch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pattern/resolved.h"

namespace dilated::pattern {

/// The lattice of a branch that a head is on.
struct BranchLattice {
  size_t branch;
  int64_t offset;
  bool operator==(const BranchLattice&) const = default;
};

/// Sets of lattices are the bits of a number.
struct HeadClass {
  std::vector<BranchLattice> lattices;  // of all column heads, each once
  std::vector<uint64_t> column_heads;   // of each column head that shares a row head: its lattices
  std::vector<int32_t> heads;
  // Of each lattice a bit among those of all classes; none where they are too many.
  std::vector<uint64_t> bits_of_all{};
};

/// The classes of a specification, kept for others with the same offsets.
class HeadClasses {
 public:
  /// `column_heads` consecutive heads of the specification share a row head: one, or in the
  /// transposed table the query heads of a KV head. Throws std::invalid_argument where they are on
  /// more lattices than a number has bits. Valid until the next call.
  const std::vector<HeadClass>& of(const ResolvedSpec& spec, int64_t column_heads);

 private:
  int64_t column_heads_ = 0;
  std::vector<std::vector<int64_t>> offsets_;  // by branch
  std::vector<HeadClass> classes_;
};

}  // namespace dilated::pattern

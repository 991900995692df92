// Sorts the positions of a stretch by which lattices they lie on, as few arithmetic progressions.
#pragma once

#include <dilated/pattern_layout.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pattern/budget.h"

namespace dilated::pattern {

/// The positions x >= 0 with x % rate == first.
struct Lattice {
  int64_t first;
  int64_t rate;
  bool operator==(const Lattice&) const = default;
};

/// The positions of one code: runs[begin..end), of which `member` is one position.
struct Part {
  uint64_t code;
  int64_t member;
  size_t begin, end;
};

class Sieve {
 public:
  explicit Sieve(Budget& budget) : budget_(budget) {}

  /// Splits 0 <= x < length by code(x) = sum of the weights of the lattices that x lies on. Runs
  /// have multiplicity 1; together the parts hold every position once. Valid until the next call.
  void split(int64_t length, const std::vector<Lattice>& lattices,
             const std::vector<uint64_t>& weights);

  const std::vector<Part>& parts() const { return parts_; }
  const std::vector<Run>& runs() const { return runs_; }

 private:
  struct Coded {
    uint64_t code;
    Run run;
  };

  void split_period(int64_t length, int64_t period);
  void split_listed(int64_t length);
  void list_progressions(uint64_t code, const std::vector<int32_t>& positions);
  void gather_parts();

  Budget& budget_;
  std::vector<uint64_t> codes_;
  std::vector<uint8_t> done_;
  std::vector<Coded> coded_;
  std::vector<Part> parts_;
  std::vector<Run> runs_;
};

}  // namespace dilated::pattern

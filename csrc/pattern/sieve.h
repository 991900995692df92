// Sorts the positions of a stretch by which lattices they lie on, as few arithmetic progressions.
#pragma once

#include <dilated/pattern_layout.h>

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "pattern/budget.h"

namespace dilated::pattern {

/// The positions x >= 0 with x % rate == first.
struct Lattice {
  int32_t first;
  int32_t rate;
  bool operator==(const Lattice&) const = default;
};

/// The positions of one code: runs[begin..end).
struct Part {
  uint64_t code;
  size_t begin, end;
};

/// Parts by ascending code; together they hold every position once. Runs have multiplicity 1.
struct Split {
  std::vector<Part> parts;
  std::vector<Run> runs;
};

class Sieve {
 public:
  /// What a position's code says of the lattices that it lies on.
  enum class Code {
    kWhich,    // a bit for each
    kHowMany,  // their number
  };

  Sieve(Code code, Budget& budget) : code_(code), budget_(budget) {}

  /// Splits 0 <= x < length, length > 0, by code. Valid until the next call.
  const Split& split(int64_t length, const std::vector<Lattice>& lattices);

 private:
  struct Coded {
    uint64_t code;
    Run run;
  };
  /// The split of one period: for every length it has the same runs, but for their counts.
  struct Period {
    int64_t period;
    Split split;
  };
  struct LatticesHash {
    size_t operator()(const std::vector<Lattice>& lattices) const;
  };

  Period& add_period(const std::vector<Lattice>& lattices, int64_t period);
  void encode(int64_t length, const std::vector<Lattice>& lattices);
  void split_period(int64_t period);
  void split_listed(int64_t length);
  void list_progressions(uint64_t code, const std::vector<int32_t>& positions);
  void gather_parts(Split& split);

  const Code code_;
  Budget& budget_;
  std::unordered_map<std::vector<Lattice>, Period, LatticesHash> periods_;
  size_t kept_runs_ = 0;
  Split listed_;

  // Scratch, kept to spare allocations.
  std::vector<uint64_t> codes_;
  std::vector<uint8_t> done_;
  std::vector<Coded> coded_;
};

}  // namespace dilated::pattern

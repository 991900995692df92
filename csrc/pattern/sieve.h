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

/// What sieves of one code keep from pattern to pattern.
class SieveMemory {
 private:
  friend class Sieve;

  /// The split of one period: for every length it has the same runs, but for their counts.
  struct Period {
    int64_t period = 0;
    uint64_t used_by = 0;  // the last sieve
    Split split{};
  };
  struct LatticesHash {
    size_t operator()(const std::vector<Lattice>& lattices) const;
  };

  void clear() {
    periods_.clear();
    runs_ = 0;
  }

  std::unordered_map<std::vector<Lattice>, Period, LatticesHash> periods_;
  size_t runs_ = 0;
  uint64_t sieves_ = 0;  // so far
};

class Sieve {
 public:
  /// What a position's code says of the lattices that it lies on.
  enum class Code {
    kWhich,    // a bit for each
    kHowMany,  // their number
  };

  /// Budget and memory are kept by reference. What is in the memory costs the budget the same.
  Sieve(Code code, Budget& budget, SieveMemory& memory);

  /// Splits 0 <= x < length, length > 0, by code. Valid until the next call.
  const Split& split(int64_t length, const std::vector<Lattice>& lattices);

 private:
  struct Coded {
    uint64_t code;
    Run run;
  };
  using Period = SieveMemory::Period;

  const Split& split_listed(int64_t length, const std::vector<Lattice>& lattices);
  Split& split_period(const std::vector<Lattice>& lattices, int64_t period, Period* known);
  void charge(int64_t length);
  void encode(int64_t length, const std::vector<Lattice>& lattices);
  void code_period(int64_t period);
  void code_listed(int64_t length);
  void list_progressions(uint64_t code, const std::vector<int32_t>& positions);
  void gather_parts(Split& split);

  const Code code_;
  Budget& budget_;
  SieveMemory& memory_;
  const uint64_t number_;
  size_t used_runs_ = 0;  // of the memory
  Split listed_;

  // Scratch, kept to spare allocations.
  std::vector<uint64_t> codes_;
  std::vector<uint8_t> done_;
  std::vector<Coded> coded_;
};

}  // namespace dilated::pattern

#include "pattern/sieve.h"

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>

namespace dilated::pattern {
namespace {

constexpr int64_t kSmallPeriod = 64;
constexpr int64_t kListedBytes = 16;  // what a listed position takes, about
constexpr int64_t kMaxPeriod = std::numeric_limits<int32_t>::max();  // no stretch is longer
constexpr size_t kMostKeptRuns = 1 << 16;

/// The least common multiple of the rates, or kMaxPeriod + 1 when it is larger than that.
int64_t common_period(const std::vector<Lattice>& lattices) {
  int64_t period = 1;
  for (const Lattice& lattice : lattices) {
    const int64_t step = lattice.rate / std::gcd(period, int64_t{lattice.rate});
    if (step > kMaxPeriod / period) {
      return kMaxPeriod + 1;
    }
    period *= step;
  }
  return period;
}

Run make_run(int64_t start, int64_t stride, int64_t count) {
  return {static_cast<int32_t>(start),
          static_cast<int32_t>(stride),
          static_cast<int32_t>(count),
          1,
          0,
          0};
}

}  // namespace

size_t SieveMemory::LatticesHash::operator()(const std::vector<Lattice>& lattices) const {
  uint64_t hash = 0;
  for (const auto [first, rate] : lattices) {
    hash = (hash ^ static_cast<uint64_t>(first) << 32 ^ static_cast<uint64_t>(rate)) *
           uint64_t{0x9e3779b97f4a7c15};
    hash ^= hash >> 29;
  }
  return static_cast<size_t>(hash);
}

Sieve::Sieve(Code code, Budget& budget, SieveMemory& memory)
    : code_(code), budget_(budget), memory_(memory), number_(++memory.sieves_) {
  if (memory_.runs_ > kMostKeptRuns) {
    memory_.clear();
  }
}

const Split& Sieve::split(int64_t length, const std::vector<Lattice>& lattices) {
  const auto found = memory_.periods_.find(lattices);
  Period* known = found == memory_.periods_.end() ? nullptr : &found->second;
  const int64_t period = known == nullptr ? common_period(lattices) : known->period;
  // A long period leaves short progressions: then listing the positions finds longer ones.
  if (period > length || (period > kSmallPeriod && period * 16 > length)) {
    return split_listed(length, lattices);
  }
  Split& split = split_period(lattices, period, known);
  for (Run& run : split.runs) {
    run.count = (static_cast<int32_t>(length) - 1 - run.start) / run.stride + 1;
  }
  return split;
}

const Split& Sieve::split_listed(int64_t length, const std::vector<Lattice>& lattices) {
  encode(length, lattices);
  code_listed(length);
  gather_parts(listed_);
  return listed_;
}

Split& Sieve::split_period(const std::vector<Lattice>& lattices, int64_t period, Period* known) {
  if (known != nullptr && known->used_by == number_) {
    return known->split;
  }
  if (used_runs_ > kMostKeptRuns) {
    memory_.clear();
    used_runs_ = 0;
    known = nullptr;
  }
  if (known == nullptr) {
    encode(period, lattices);
    code_period(period);
    known = &memory_.periods_[lattices];
    known->period = period;
    gather_parts(known->split);
    memory_.runs_ += known->split.runs.size();
  } else {
    charge(period);
  }
  known->used_by = number_;
  used_runs_ += known->split.runs.size();
  return known->split;
}

void Sieve::charge(int64_t length) {
  budget_.need_bytes(length * kListedBytes);
  budget_.add_steps(length);
}

/// The codes of 0 <= x < length.
void Sieve::encode(int64_t length, const std::vector<Lattice>& lattices) {
  charge(length);
  codes_.assign(static_cast<size_t>(length), 0);
  uint64_t weight = 1;
  for (const auto [first, rate] : lattices) {
    for (int64_t x = first; x < length; x += rate) {
      codes_[static_cast<size_t>(x)] += weight;
    }
    weight <<= code_ == Code::kWhich ? 1 : 0;
  }
}

// Residue classes of the smallest modulus first, so that nested lattices give one run each: with
// rates 1, 2, 4 the positions of rate 1 alone are the odd ones, a single run of stride 2.
void Sieve::code_period(int64_t period) {
  coded_.clear();
  done_.assign(static_cast<size_t>(period), 0);
  int64_t left = period;
  for (int64_t modulus = 1; left > 0; ++modulus) {
    if (period % modulus != 0) {
      continue;
    }
    for (int64_t residue = 0; residue < modulus; ++residue) {
      const uint64_t code = codes_[static_cast<size_t>(residue)];
      int64_t x = residue;
      while (x < period && !done_[static_cast<size_t>(x)] &&
             codes_[static_cast<size_t>(x)] == code) {
        x += modulus;
      }
      if (x < period) {
        continue;
      }
      for (x = residue; x < period; x += modulus) {
        done_[static_cast<size_t>(x)] = 1;
        --left;
      }
      coded_.push_back({code, make_run(residue, modulus, 0)});
    }
  }
}

void Sieve::code_listed(int64_t length) {
  coded_.clear();
  std::map<uint64_t, std::vector<int32_t>> positions;
  for (int64_t x = 0; x < length; ++x) {
    positions[codes_[static_cast<size_t>(x)]].push_back(static_cast<int32_t>(x));
  }
  for (const auto& [code, list] : positions) {
    list_progressions(code, list);
  }
}

// Greedy: from the first position left, the longest progression whose second position is one of the
// next few.
void Sieve::list_progressions(uint64_t code, const std::vector<int32_t>& positions) {
  constexpr int kCandidates = 4;
  const int32_t base = positions.front();
  const int32_t extent = positions.back() - base + 1;
  done_.assign(static_cast<size_t>(extent), 1);
  for (const int32_t position : positions) {
    done_[static_cast<size_t>(position - base)] = 0;
  }
  for (const int32_t position : positions) {
    const int32_t x = position - base;
    if (done_[static_cast<size_t>(x)]) {
      continue;
    }
    int32_t stride = 1;
    int32_t count = 1;
    int candidates = 0;
    for (int32_t y = x + 1; y < extent && candidates < kCandidates; ++y) {
      if (done_[static_cast<size_t>(y)]) {
        continue;
      }
      ++candidates;
      int32_t reach = 1;
      for (int32_t z = y; z < extent && !done_[static_cast<size_t>(z)]; z += y - x) {
        ++reach;
      }
      if (reach > count) {
        count = reach;
        stride = y - x;
      }
    }
    for (int32_t j = 0; j < count; ++j) {
      done_[static_cast<size_t>(x + j * stride)] = 1;
    }
    coded_.push_back({code, make_run(position, stride, count)});
  }
}

void Sieve::gather_parts(Split& split) {
  std::stable_sort(coded_.begin(), coded_.end(),
                   [](const Coded& a, const Coded& b) { return a.code < b.code; });
  split.parts.clear();
  split.runs.clear();
  for (const Coded& coded : coded_) {
    if (split.parts.empty() || split.parts.back().code != coded.code) {
      split.parts.push_back({coded.code, split.runs.size(), split.runs.size()});
    }
    split.runs.push_back(coded.run);
    split.parts.back().end = split.runs.size();
  }
}

}  // namespace dilated::pattern

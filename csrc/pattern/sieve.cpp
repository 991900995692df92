#include "pattern/sieve.h"

#include <algorithm>
#include <map>
#include <numeric>

namespace dilated::pattern {
namespace {

constexpr int64_t kSmallPeriod = 64;
constexpr int64_t kListedBytes = 16;  // that a listed position takes, about

/// The least common multiple of the rates, or `limit` + 1 when it is larger than that.
int64_t common_period(const std::vector<Lattice>& lattices, int64_t limit) {
  int64_t period = 1;
  for (const Lattice& lattice : lattices) {
    const int64_t step = lattice.rate / std::gcd(period, lattice.rate);
    if (step > limit / period) {
      return limit + 1;
    }
    period *= step;
  }
  return period;
}

Run make_run(int64_t start, int64_t stride, int64_t count) {
  return {static_cast<int32_t>(start), static_cast<int32_t>(stride), static_cast<int32_t>(count), 1,
          0};
}

}  // namespace

void Sieve::split(int64_t length, const std::vector<Lattice>& lattices,
                  const std::vector<uint64_t>& weights) {
  coded_.clear();
  // A long period leaves short progressions: then listing the positions finds longer ones.
  const int64_t period = common_period(lattices, length);
  const bool periodic = period <= length && (period <= kSmallPeriod || period * 16 <= length);
  const int64_t listed = periodic ? period : length;
  budget_.need_bytes(listed * kListedBytes);
  budget_.add_steps(listed);
  codes_.assign(static_cast<size_t>(listed), 0);
  for (size_t i = 0; i < lattices.size(); ++i) {
    for (int64_t x = lattices[i].first; x < listed; x += lattices[i].rate) {
      codes_[static_cast<size_t>(x)] += weights[i];
    }
  }
  if (periodic) {
    split_period(length, period);
  } else {
    split_listed(length);
  }
  gather_parts();
}

// Residue classes of the smallest modulus first, so that nested lattices give one run each: with
// rates 1, 2, 4 the positions of rate 1 alone are the odd ones, a single run of stride 2.
void Sieve::split_period(int64_t length, int64_t period) {
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
      coded_.push_back(
          {code, make_run(residue, modulus, (length - residue + modulus - 1) / modulus)});
    }
  }
}

void Sieve::split_listed(int64_t length) {
  std::map<uint64_t, std::vector<int32_t>> positions;
  for (int64_t x = 0; x < length; ++x) {
    positions[codes_[static_cast<size_t>(x)]].push_back(static_cast<int32_t>(x));
  }
  for (const auto& [code, list] : positions) {
    list_progressions(code, list);
  }
}

// Greedy: from the first position left, the longest progression among those that one of the next
// few positions begins.
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

void Sieve::gather_parts() {
  std::stable_sort(coded_.begin(), coded_.end(),
                   [](const Coded& a, const Coded& b) { return a.code < b.code; });
  parts_.clear();
  runs_.clear();
  for (const Coded& coded : coded_) {
    if (parts_.empty() || parts_.back().code != coded.code) {
      parts_.push_back({coded.code, coded.run.start, runs_.size(), runs_.size()});
    }
    runs_.push_back(coded.run);
    parts_.back().end = runs_.size();
  }
}

}  // namespace dilated::pattern

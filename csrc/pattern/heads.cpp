#include "pattern/heads.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

namespace dilated::pattern {
namespace {

constexpr size_t kMaxLattices = 64;

/// The bit of a lattice, which is added to the list if it is new.
uint64_t bit_of(const BranchLattice& lattice, std::vector<BranchLattice>& lattices) {
  const auto found = std::find(lattices.begin(), lattices.end(), lattice);
  const auto index = static_cast<size_t>(found - lattices.begin());
  if (index == kMaxLattices) {
    throw std::invalid_argument("head_offsets: must give the query heads of one KV head at most " +
                                std::to_string(kMaxLattices) +
                                " distinct (branch, offset) pairs, got more");
  }
  if (found == lattices.end()) {
    lattices.push_back(lattice);
  }
  return uint64_t{1} << index;
}

/// offsets[g * branches + i]: column head g's in branch i.
HeadClass make_class(const std::vector<int64_t>& offsets, size_t branches) {
  HeadClass result;
  for (size_t first = 0; first < offsets.size(); first += branches) {
    uint64_t lattices = 0;
    for (size_t i = 0; i < branches; ++i) {
      if (const int64_t offset = offsets[first + i]; offset >= 0) {
        lattices |= bit_of({i, offset}, result.lattices);
      }
    }
    result.column_heads.push_back(lattices);
  }
  return result;
}

void number_lattices(std::vector<HeadClass>& classes) {
  std::map<std::pair<size_t, int64_t>, size_t> numbers;
  for (const HeadClass& head_class : classes) {
    for (const auto& [branch, offset] : head_class.lattices) {
      numbers.try_emplace({branch, offset}, numbers.size());
    }
  }
  if (numbers.size() > kMaxLattices) {
    return;
  }
  for (HeadClass& head_class : classes) {
    for (const auto& [branch, offset] : head_class.lattices) {
      head_class.bits_of_all.push_back(uint64_t{1} << numbers[{branch, offset}]);
    }
  }
}

std::vector<HeadClass> classify_heads(const ResolvedSpec& spec, int64_t column_heads) {
  std::map<std::vector<int64_t>, size_t> ids;
  std::vector<HeadClass> classes;
  for (int64_t head = 0; head < spec.heads / column_heads; ++head) {
    std::vector<int64_t> offsets;
    for (int64_t g = head * column_heads; g < (head + 1) * column_heads; ++g) {
      for (const Branch& branch : spec.branches) {
        offsets.push_back(branch.head_offsets[static_cast<size_t>(g)]);
      }
    }
    const auto [found, is_new] = ids.try_emplace(std::move(offsets), classes.size());
    if (is_new) {
      classes.push_back(make_class(found->first, spec.branches.size()));
    }
    classes[found->second].heads.push_back(static_cast<int32_t>(head));
  }
  number_lattices(classes);
  return classes;
}

}  // namespace

const std::vector<HeadClass>& HeadClasses::of(const ResolvedSpec& spec, int64_t column_heads) {
  const bool is_known = column_heads == column_heads_ &&
                        std::ranges::equal(spec.branches, offsets_, {}, &Branch::head_offsets);
  if (!is_known) {
    column_heads_ = 0;
    classes_ = classify_heads(spec, column_heads);
    offsets_.clear();
    for (const Branch& branch : spec.branches) {
      offsets_.push_back(branch.head_offsets);
    }
    column_heads_ = column_heads;
  }
  return classes_;
}

}  // namespace dilated::pattern

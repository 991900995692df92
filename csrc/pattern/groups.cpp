#include "pattern/groups.h"

#include <algorithm>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>

namespace dilated::pattern {
namespace {

/// A row's lattices are told apart by the bits of its code.
constexpr size_t kMaxLattices = 64;

int64_t modulo(int64_t a, int64_t b) {
  const int64_t m = a % b;
  return m < 0 ? m + b : m;
}

int64_t divide_up(int64_t a, int64_t b) { return a <= 0 ? 0 : (a + b - 1) / b; }

Run make_run(int64_t start, int64_t stride, int64_t count, uint64_t multiplicity, int32_t head) {
  return {static_cast<int32_t>(start), static_cast<int32_t>(stride), static_cast<int32_t>(count),
          static_cast<uint16_t>(multiplicity), static_cast<uint16_t>(head)};
}

/// Whether no earlier head is on the lattice of offsets[j].
bool is_new_lattice(const std::vector<int64_t>& offsets, size_t branches, size_t j) {
  if (offsets[j] < 0) {
    return false;
  }
  for (size_t k = j % branches; k < j; k += branches) {
    if (offsets[k] == offsets[j]) {  // there are few lattices, so one of the first heads
      return false;
    }
  }
  return true;
}

void check_lattices(const std::vector<int64_t>& offsets, size_t branches) {
  size_t lattices = 0;
  for (size_t j = 0; j < offsets.size(); ++j) {
    lattices += is_new_lattice(offsets, branches, j) ? 1 : 0;
    if (lattices > kMaxLattices) {
      throw std::invalid_argument("head_offsets: the query heads of one KV head may have at most " +
                                  std::to_string(kMaxLattices) +
                                  " distinct (branch, offset) pairs, got more");
    }
  }
}

}  // namespace

std::vector<HeadClass> classify_heads(const PatternSpec& spec, int64_t column_heads) {
  const auto heads = static_cast<size_t>(spec.heads);
  const auto shared = static_cast<size_t>(column_heads);
  std::map<std::vector<int64_t>, size_t> ids;
  std::vector<HeadClass> classes;
  for (size_t head = 0; head < heads / shared; ++head) {
    std::vector<int64_t> offsets;
    for (size_t g = 0; g < shared; ++g) {
      for (size_t i = 0; i < spec.segment_lengths.size(); ++i) {
        offsets.push_back(spec.head_offsets[i * heads + head * shared + g]);
      }
    }
    const auto [found, is_new] = ids.try_emplace(offsets, classes.size());
    if (is_new) {
      check_lattices(offsets, spec.segment_lengths.size());
      classes.push_back({std::move(offsets), {}});
    }
    classes[found->second].heads.push_back(static_cast<int32_t>(head));
  }
  return classes;
}

void GroupPlanner::plan(const CellKind& kind, const HeadClass& heads, int32_t head_class) {
  const auto first = static_cast<std::ptrdiff_t>(groups_.size());
  find_lattices(kind, heads);
  row_sieve_.split(kind.length, lattices_, weights_);
  for (const Part& part : row_sieve_.parts()) {
    Group group{};
    group.head_class = head_class;
    add_group(kind, heads, part, group);
  }
  std::stable_sort(groups_.begin() + first, groups_.end(),
                   [](const Group& a, const Group& b) { return a.columns > b.columns; });
}

/// One lattice for each distinct (branch, offset) of the heads, as seen from the cell.
void GroupPlanner::find_lattices(const CellKind& kind, const HeadClass& heads) {
  const size_t branches = branches_.size();
  const std::vector<int64_t>& offsets = heads.offsets;
  lattices_.clear();
  weights_.clear();
  budget_.add_steps(static_cast<int64_t>(offsets.size()));
  for (size_t j = 0; j < offsets.size(); ++j) {
    const size_t branch = j % branches;
    if (!is_new_lattice(offsets, branches, j)) {
      continue;
    }
    const int64_t rate = branches_[branch].dilation_rate;
    weights_.push_back(uint64_t{1} << lattices_.size());
    lattices_.push_back({modulo(offsets[j] - kind.branches[branch].phase, rate), rate});
  }
}

void GroupPlanner::add_group(const CellKind& kind, const HeadClass& heads, const Part& part,
                             Group group) {
  group.row_runs = static_cast<int32_t>(runs_.size());
  group.row_run_count = static_cast<int32_t>(part.end - part.begin);
  for (size_t j = part.begin; j < part.end; ++j) {
    const Run& run = row_sieve_.runs()[j];
    runs_.push_back(run);
    group.rows += run.count;
  }
  group.column_runs = static_cast<int32_t>(runs_.size());
  const size_t branches = branches_.size();
  for (size_t g = 0; g * branches < heads.offsets.size(); ++g) {
    const int64_t* offsets = heads.offsets.data() + g * branches;
    find_members(kind, offsets, part.member);
    add_columns(kind, offsets, static_cast<int32_t>(g), group);
    if (counts_zeros_ && kind.in_columns) {
      group.zero_keys += static_cast<int32_t>(zero_keys(kind, offsets));
    }
  }
  group.column_run_count = static_cast<int32_t>(runs_.size()) - group.column_runs;
  groups_.push_back(group);
  budget_.add_bytes(static_cast<int64_t>(
      sizeof(Group) + sizeof(Run) * (runs_.size() - static_cast<size_t>(group.row_runs))));
}

void GroupPlanner::find_members(const CellKind& kind, const int64_t* offsets, int64_t row) {
  members_.clear();
  for (size_t i = 0; i < branches_.size(); ++i) {
    if (offsets[i] >= 0 &&
        (row + kind.branches[i].phase) % branches_[i].dilation_rate == offsets[i]) {
      members_.push_back(i);
    }
  }
}

/// The union of the segments that the row is in, cut where the set of segments changes.
void GroupPlanner::add_columns(const CellKind& kind, const int64_t* offsets, int32_t head,
                               Group& group) {
  boundaries_.clear();
  for (const size_t i : members_) {
    const BranchAt& at = kind.branches[i];
    if (at.lo < at.hi) {
      boundaries_.push_back(at.lo);
      boundaries_.push_back(at.hi);
    }
  }
  std::sort(boundaries_.begin(), boundaries_.end());
  boundaries_.erase(std::unique(boundaries_.begin(), boundaries_.end()), boundaries_.end());
  for (size_t j = 0; j + 1 < boundaries_.size(); ++j) {
    add_interval(kind, offsets, head, boundaries_[j], boundaries_[j + 1], group);
  }
}

/// Within lo <= x < hi a column's multiplicity is the number of lattices that it lies on.
void GroupPlanner::add_interval(const CellKind& kind, const int64_t* offsets, int32_t head,
                                int64_t lo, int64_t hi, Group& group) {
  active_.clear();
  for (const size_t i : members_) {
    const BranchAt& at = kind.branches[i];
    if (at.lo <= lo && hi <= at.hi) {
      const int64_t rate = branches_[i].dilation_rate;
      active_.push_back({modulo(offsets[i] - at.phase - lo, rate), rate});
    }
  }
  if (active_.size() == 1) {
    const auto [first, rate] = active_.front();
    add_column_run(make_run(lo + first, rate, divide_up(hi - lo - first, rate), 1, head), group);
    return;
  }
  weights_.assign(active_.size(), 1);
  column_sieve_.split(hi - lo, active_, weights_);
  for (const Part& part : column_sieve_.parts()) {
    for (size_t j = part.begin; part.code > 0 && j < part.end; ++j) {
      const Run& run = column_sieve_.runs()[j];
      add_column_run(make_run(lo + run.start, run.stride, run.count, part.code, head), group);
    }
  }
}

void GroupPlanner::add_column_run(const Run& run, Group& group) {
  if (run.count == 0) {
    return;
  }
  if (group.columns > std::numeric_limits<int32_t>::max() - run.count) {
    throw std::invalid_argument("seq_len: a row would meet 2^31 columns or more");
  }
  group.columns += run.count;
  runs_.push_back(run);
}

/// torchscale fills a segment's lattice up to ceil(w / r) keys, whatever part of it lies within the
/// sequence.
int64_t GroupPlanner::zero_keys(const CellKind& kind, const int64_t* offsets) const {
  int64_t zeros = 0;
  for (const size_t i : members_) {
    const auto [length, rate] = branches_[i];
    zeros += divide_up(length, rate) - divide_up(kind.branches[i].cut - offsets[i], rate);
  }
  return zeros;
}

}  // namespace dilated::pattern

#include "pattern/groups.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <stdexcept>

namespace dilated::pattern {
namespace {

/// a mod b, at least 0. Both are below 2^32 in size: 32-bit divisions are faster.
int32_t modulo(int64_t a, int32_t b) {
  const auto divisor = static_cast<uint32_t>(b);
  const uint32_t rest = static_cast<uint32_t>(a < 0 ? -a : a) % divisor;
  return static_cast<int32_t>(a < 0 && rest > 0 ? divisor - rest : rest);
}

int64_t divide_up(int64_t a, int64_t b) {
  return a <= 0 ? 0 : static_cast<uint32_t>(a + b - 1) / static_cast<uint32_t>(b);
}

/// Calls `function` with each bit's index, the lowest first.
template <typename Function>
void for_each_bit(uint64_t set, Function&& function) {
  for (; set != 0; set &= set - 1) {
    function(static_cast<size_t>(std::countr_zero(set)));
  }
}

}  // namespace

void GroupPlanner::plan(const CellKind& kind, int32_t number, const HeadClass& heads,
                        int32_t head_class) {
  const auto first = static_cast<std::ptrdiff_t>(lists_.groups.size());
  look_around(kind, heads);
  const Split& rows = rows_.split(kind.length, lattices_);
  for (const Part& part : rows.parts) {
    Group group{};
    group.head_class = head_class;
    add_group(rows, part, number, heads, group);
  }
  std::sort(lists_.groups.begin() + first, lists_.groups.end(), [](const Group& a, const Group& b) {
    return a.columns != b.columns ? a.columns > b.columns : a.row_runs < b.row_runs;
  });
}

/// The class's lattices as seen from the cell: where they lie, and where their segments end.
void GroupPlanner::look_around(const CellKind& kind, const HeadClass& heads) {
  lattices_.clear();
  zeros_.clear();
  edges_.clear();
  budget_.add_steps(static_cast<int64_t>(heads.lattices.size() * kind.columns.size() +
                                         heads.column_heads.size()));
  for (const auto& [branch, offset] : heads.lattices) {
    const BranchAt& at = kind.branches[branch];
    const auto rate = static_cast<int32_t>(spec_.branches[branch].dilation_rate);
    lattices_.push_back({modulo(offset - at.phase, rate), rate});
    // torchscale fills a segment's lattice up to ceil(w / r) keys, however much of it lies beyond
    // the sequence.
    zeros_.push_back(counts_zeros_ && kind.in_columns
                         ? divide_up(at.width, rate) - divide_up(at.length - offset, rate)
                         : 0);
  }
  for (size_t stretch = 0; stretch < kind.columns.size(); ++stretch) {
    add_edges(kind, heads, stretch);
  }
}

void GroupPlanner::add_edges(const CellKind& kind, const HeadClass& heads, size_t stretch) {
  const int64_t begin = kind.columns[stretch].begin, end = kind.columns[stretch].end;
  const auto first = static_cast<std::ptrdiff_t>(edges_.size());
  uint64_t bit = 1;
  for (const auto& [branch, offset] : heads.lattices) {
    const auto& [phase, length, width] = kind.branches[branch];
    const int64_t lo = std::max(-phase, begin), hi = std::min(length - phase, end);
    if (lo < hi) {
      edges_.push_back({lo, bit, 0, static_cast<uint8_t>(stretch)});
      edges_.push_back({hi, bit, 0, static_cast<uint8_t>(stretch)});
    }
    bit <<= 1;
  }
  std::sort(edges_.begin() + first, edges_.end(),
            [](const Edge& a, const Edge& b) { return a.at < b.at; });
  uint64_t covers = 0;
  for (auto edge = edges_.begin() + first; edge != edges_.end(); ++edge) {
    covers ^= edge->cuts;
    edge->covers = covers;
  }
}

void GroupPlanner::add_group(const Split& rows, const Part& part, int32_t kind,
                             const HeadClass& heads, Group group) {
  group.row_runs = static_cast<int32_t>(lists_.runs.size());
  group.row_run_count = static_cast<int32_t>(part.end - part.begin);
  for (size_t j = part.begin; j < part.end; ++j) {
    lists_.runs.push_back(rows.runs[j]);
    group.rows += rows.runs[j].count;
  }
  if (heads.column_heads.size() > 1 || heads.bits_of_all.empty()) {
    add_all_columns(part.code, heads, group);
  } else {
    uint64_t lattices = 0;
    for_each_bit(part.code, [&](size_t i) { lattices |= heads.bits_of_all[i]; });
    const auto [found, is_new] = seen_.try_emplace({kind, lattices});
    if (is_new) {
      add_all_columns(part.code, heads, group);
      found->second = group;
    } else {
      group.column_runs = found->second.column_runs;
      group.column_run_count = found->second.column_run_count;
      group.columns = found->second.columns;
      group.zero_keys = found->second.zero_keys;
    }
  }
  lists_.groups.push_back(group);
  budget_.add_bytes(static_cast<int64_t>(
      sizeof(Group) + sizeof(Run) * (lists_.runs.size() - static_cast<size_t>(group.row_runs))));
}

/// Of a row on these lattices.
void GroupPlanner::add_all_columns(uint64_t row, const HeadClass& heads, Group& group) {
  group.column_runs = static_cast<int32_t>(lists_.runs.size());
  size_t before = lists_.runs.size();  // the previous head's runs
  for (size_t head = 0; head < heads.column_heads.size(); ++head) {
    const uint64_t lattices = row & heads.column_heads[head];
    const size_t first = lists_.runs.size();
    if (head > 0 && lattices == (row & heads.column_heads[head - 1])) {
      repeat_runs(before, first);
    } else {
      add_columns(lattices);
    }
    group.columns = count_columns(group.columns, first, head);
    for_each_bit(lattices, [&](size_t i) { group.zero_keys += static_cast<int32_t>(zeros_[i]); });
    before = first;
  }
  group.column_run_count = static_cast<int32_t>(lists_.runs.size()) - group.column_runs;
}

/// Appends runs[begin..end) again.
void GroupPlanner::repeat_runs(size_t begin, size_t end) {
  lists_.runs.resize(end + (end - begin));
  std::copy_n(lists_.runs.data() + begin, end - begin, lists_.runs.data() + end);
}

/// Marks the runs from `first` on as the head's; returns `columns` plus theirs.
int32_t GroupPlanner::count_columns(int64_t columns, size_t first, size_t head) {
  for (size_t j = first; j < lists_.runs.size(); ++j) {
    lists_.runs[j].head = static_cast<uint16_t>(head);
    columns += lists_.runs[j].count;
  }
  if (columns > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("seq_len: must give a row below 2^31 columns, got more");
  }
  return static_cast<int32_t>(columns);
}

/// The union of the segments of a row's lattices, cut where one of them begins or ends.
void GroupPlanner::add_columns(uint64_t lattices) {
  uint64_t covers = 0;
  const Edge* from = nullptr;
  for (const Edge& edge : edges_) {
    if ((edge.cuts & lattices) == 0) {
      continue;
    }
    if (covers != 0 && from->at < edge.at) {
      add_interval(covers, *from, edge.at);
    }
    covers = edge.covers & lattices;
    from = &edge;
  }
}

/// The columns of an interval, in which a column's multiplicity is the number of lattices that it
/// lies on.
void GroupPlanner::add_interval(uint64_t lattices, const Edge& from, int64_t to) {
  const int64_t lo = from.at, hi = to;
  active_.clear();
  for_each_bit(lattices, [&](size_t i) {
    const auto [first, rate] = lattices_[i];
    active_.push_back({modulo(first - lo, rate), rate});
  });
  const auto add_run = [&](int32_t first, int32_t stride, int64_t count, uint64_t multiplicity) {
    lists_.runs.push_back({static_cast<int32_t>(lo) + first, stride, static_cast<int32_t>(count),
                           static_cast<uint8_t>(multiplicity), from.stretch, 0});
  };
  if (active_.size() == 1) {
    const auto [first, rate] = active_.front();
    if (hi - lo > first) {
      add_run(first, rate, divide_up(hi - lo - first, rate), 1);
    }
    return;
  }
  const Split& split = columns_.split(hi - lo, active_);
  for (const Part& part : split.parts) {
    for (size_t j = part.begin; part.code > 0 && j < part.end; ++j) {
      const Run& run = split.runs[j];
      add_run(run.start, run.stride, run.count, part.code);
    }
  }
}

}  // namespace dilated::pattern

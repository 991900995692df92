#include "pattern/merge.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <utility>

namespace dilated::pattern {
namespace {

/// What the rows of a group see, as from the span's first cell.
using Columns = std::vector<int32_t>;

struct Merged {
  Group group;
  int32_t shift;  // of its columns
  std::vector<Run> rows;
};

Run moved(Run run, int32_t shift) {
  run.start += shift;
  return run;
}

Columns columns_of(const Group& group, const Lists& lists, int32_t shift) {
  Columns columns{group.zero_keys};
  const Run* run = lists.runs.data() + group.column_runs;
  for (const Run* end = run + group.column_run_count; run < end; ++run) {
    columns.insert(columns.end(), {run->start + shift, run->stride, run->count, run->multiplicity,
                                   run->stretch, run->head});
  }
  return columns;
}

/// Appends the run; continues the last one if it can.
void append_run(std::vector<Run>& rows, const Run& run) {
  if (!rows.empty()) {
    Run& last = rows.back();
    const int32_t step = run.start - last.start - last.stride * (last.count - 1);
    if (step > 0 && (last.count == 1 || last.stride == step) &&
        (run.count == 1 || run.stride == step)) {
      last.stride = step;
      last.count += run.count;
      return;
    }
  }
  rows.push_back(run);
}

class Merger {
 public:
  Merger(const Cells& cells, const std::vector<GroupSpan>& groups, size_t classes,
         const Lists& lists, Budget& budget)
      : cells_(cells), groups_(groups), classes_(classes), lists_(lists), budget_(budget) {}

  std::optional<MergedCells> merge() {
    for (size_t s = 0; s + 1 < cells_.spans.size(); ++s) {
      const size_t begin = cells_.spans[s], end = cells_.spans[s + 1];
      const auto first = cells_.cells.begin() + static_cast<std::ptrdiff_t>(begin);
      const auto last = cells_.cells.begin() + static_cast<std::ptrdiff_t>(end);
      const bool is_one_stretch = std::all_of(first, last, [&](const Cell& cell) {
        return cell.row_shift == first->row_shift && cell.first_stretch == first->first_stretch;
      });
      if (!is_one_stretch) {
        return std::nullopt;
      }
      std::vector<int32_t> kinds;
      std::transform(first, last, std::back_inserter(kinds), [](const Cell& c) { return c.kind; });
      budget_.add_steps(static_cast<int64_t>(kinds.size()));
      const auto [found, is_new] =
          span_kinds_.try_emplace(std::move(kinds), static_cast<int32_t>(span_kinds_.size()));
      for (size_t c = 0; is_new && c < classes_; ++c) {
        if (!merge_span(begin, end, c)) {
          return std::nullopt;
        }
      }
      merged_.cells.spans.push_back(s);
      merged_.cells.cells.push_back(*first);
      merged_.cells.cells.back().kind = found->second;
    }
    merged_.cells.spans.push_back(merged_.cells.cells.size());
    merged_.cells.kinds.resize(span_kinds_.size());
    return std::move(merged_);
  }

 private:
  /// False if the groups become more instead of fewer, as cells that look alike no longer share
  /// them.
  bool merge_span(size_t begin, size_t end, size_t head_class) {
    std::map<Columns, size_t> known;
    std::vector<Merged> found;
    for (size_t cell = begin; cell < end; ++cell) {
      const auto kind = static_cast<size_t>(cells_.cells[cell].kind);
      const auto [first, count] = groups_[kind * classes_ + head_class];
      const auto shift = static_cast<int32_t>(cells_.cells[cell].begin - cells_.cells[begin].begin);
      for (int32_t i = first; i < first + count; ++i) {
        const Group& group = lists_.groups[static_cast<size_t>(i)];
        budget_.add_steps(group.column_run_count + group.row_run_count);
        const auto [place, is_new] =
            known.try_emplace(columns_of(group, lists_, shift), found.size());
        if (is_new) {
          found.push_back({group, shift, {}});
        }
        const Run* run = lists_.runs.data() + group.row_runs;
        for (const Run* last = run + group.row_run_count; run < last; ++run) {
          append_run(found[place->second].rows, moved(*run, shift));
        }
      }
      if (merged_.lists.groups.size() + found.size() > lists_.groups.size()) {
        return false;
      }
    }
    append(found);
    return true;
  }

  void append(std::vector<Merged>& found) {
    std::stable_sort(found.begin(), found.end(), [](const Merged& a, const Merged& b) {
      return a.group.columns > b.group.columns;
    });
    auto& [groups, runs] = merged_.lists;
    merged_.groups.push_back(
        {static_cast<int32_t>(groups.size()), static_cast<int32_t>(found.size())});
    for (auto& [group, shift, rows] : found) {
      const Run* columns = lists_.runs.data() + group.column_runs;
      group.row_runs = static_cast<int32_t>(runs.size());
      group.row_run_count = static_cast<int32_t>(rows.size());
      group.rows = 0;
      for (const Run& run : rows) {
        group.rows += run.count;
        runs.push_back(run);
      }
      group.column_runs = static_cast<int32_t>(runs.size());
      for (int32_t i = 0; i < group.column_run_count; ++i) {
        runs.push_back(moved(columns[i], shift));
      }
      groups.push_back(group);
    }
    budget_.need_bytes(
        static_cast<int64_t>(groups.size() * sizeof(Group) + runs.size() * sizeof(Run)));
  }

  const Cells& cells_;
  const std::vector<GroupSpan>& groups_;
  const size_t classes_;
  const Lists& lists_;
  Budget& budget_;
  std::map<std::vector<int32_t>, int32_t> span_kinds_;  // by the kinds of their cells
  MergedCells merged_;
};

}  // namespace

std::optional<MergedCells> merge_cells(const Cells& cells, const std::vector<GroupSpan>& groups,
                                       size_t classes, const Lists& lists, Budget& budget) {
  return Merger(cells, groups, classes, lists, budget).merge();
}

}  // namespace dilated::pattern

// Counts the (query, key) pairs of a pattern: on paper, distinct, and as tiles compute them.
#include <dilated/pattern.h>

#include <algorithm>
#include <functional>
#include <map>
#include <span>
#include <vector>

#include "pattern/poller.h"
#include "pattern/resolved.h"

namespace dilated {
namespace {

using pattern::Poller;
using pattern::ResolvedSpec;
using pattern::segment_at;

struct Counter {
  const PatternSpec& spec;
  TableView table;
  int64_t row_tile;

  /// Columns of the group that the row at `last` may see.
  int64_t columns_through(const Group& group, int32_t origin, int32_t last) const {
    int64_t columns = 0;
    for (int32_t j = 0; j < group.column_run_count; ++j) {
      columns += count_through(table.runs()[group.column_runs + j], origin, last);
    }
    return columns;
  }

  int64_t round_up(int64_t columns) const {
    const int64_t tile = column_tile(row_tile);
    return (columns + tile - 1) / tile * tile;
  }

  void add_tile(const Tile& tile, PatternReport& report) const {
    const Group& group = table.groups()[tile.group];
    const int32_t* begin = table.class_begin() + group.head_class;
    const int64_t heads = begin[1] - begin[0];
    if (!spec.is_causal) {
      report.distinct += heads * tile.rows * group.columns;
      report.computed += heads * row_tile * round_up(group.columns);
      return;
    }
    int32_t last = tile.origin;
    int64_t skip = tile.first_row;
    int64_t left = tile.rows;
    for (int32_t j = 0; j < group.row_run_count && left > 0; ++j) {
      const Run& run = table.runs()[group.row_runs + j];
      for (int64_t k = skip; k < run.count && left > 0; ++k, --left) {
        const auto position = static_cast<int32_t>(tile.origin + run.start + run.stride * k);
        report.distinct += heads * columns_through(group, tile.origin, position);
        last = std::max(last, position);
      }
      skip = std::max<int64_t>(0, skip - run.count);
    }
    report.computed += heads * row_tile * round_up(columns_through(group, tile.origin, last));
  }
};

/// Positions of the lattice first, first + rate, ... below x.
int64_t count_below(int64_t x, int64_t first, int64_t rate) {
  return x <= first ? 0 : (x - first + rate - 1) / rate;
}

/// Of positions of a lattice, numbered along it.
int64_t count_pairs(const Range& queries, const Range& keys, bool is_causal) {
  const int64_t all_keys = keys.end - keys.begin;
  if (!is_causal) {
    return (queries.end - queries.begin) * all_keys;
  }
  // Queries among the keys see 1, 2, ... of them more; those after the keys, all.
  const int64_t begin = std::max(queries.begin, keys.begin);
  const int64_t end = std::clamp(keys.end, begin, std::max(begin, queries.end));
  const int64_t first = begin - keys.begin, last = end - keys.begin;
  return (last * (last + 1) - first * (first + 1)) / 2 +
         std::max<int64_t>(queries.end - std::max(end, queries.begin), 0) * all_keys;
}

/// The stretches that meet a segment; they are in the sequence's order.
std::span<const Range> meeting(const std::vector<Range>& stretches, const Range& segment) {
  const auto first = std::ranges::partition_point(
      stretches, [&](const Range& stretch) { return stretch.end <= segment.begin; });
  const auto last = std::partition_point(
      first, stretches.end(), [&](const Range& stretch) { return stretch.begin < segment.end; });
  return {first, last};
}

/// Of one branch and head, in a segment.
int64_t segment_pairs(const ResolvedSpec& spec, const Range& segment, int64_t offset,
                      int64_t rate) {
  const auto below = [&](int64_t x) {
    return count_below(std::clamp(x, segment.begin, segment.end), segment.begin + offset, rate);
  };
  const auto on_lattice = [&](const Range& stretch) {
    return Range{below(stretch.begin), below(stretch.end)};
  };
  int64_t pairs = 0;
  for (const Range& queries : meeting(spec.queries, segment)) {
    for (const std::vector<Range>* stretches : {&spec.keys, &spec.far_keys}) {
      for (const Range& keys : meeting(*stretches, segment)) {
        pairs += count_pairs(on_lattice(queries), on_lattice(keys), spec.is_causal);
      }
    }
  }
  return pairs;
}

int64_t nominal_pairs(const PatternSpec& given, Poller& poller) {
  const ResolvedSpec spec(given);
  int64_t pairs = 0;
  for (const Branch& branch : spec.branches) {
    std::map<int64_t, int64_t> heads;  // by offset
    for (const int64_t offset : branch.head_offsets) {
      ++heads[offset];
    }
    heads.erase(-1);
    for (const Sequence& sequence : *spec.sequences) {
      const int64_t end = heads.empty() ? sequence.first : sequence.first + sequence.length;
      for (int64_t begin = sequence.first; begin < end;) {
        const Range segment = segment_at(branch, sequence, begin);
        for (const auto& [offset, count] : heads) {
          pairs += count * segment_pairs(spec, segment, offset, branch.dilation_rate);
        }
        begin = segment.end;
        poller.add_steps(1);
      }
    }
  }
  return pairs;
}

}  // namespace

PatternReport report(const PatternSpec& spec, const std::vector<int32_t>& words,
                     const std::function<void()>& poll) {
  const PatternView view{words.data()};
  const TableView table = view.forward();
  PatternReport result{};
  Poller poller(poll, /*interval=*/1024);
  result.nominal = nominal_pairs(spec, poller);
  result.bytes = static_cast<int64_t>(words.size() * sizeof(int32_t));
  result.tiles = table.table->tiles;
  result.groups = table.table->groups;
  result.runs = table.table->runs;
  const Counter counter{spec, table, table.table->row_tile};
  for (int32_t t = 0; t < table.table->tiles; ++t) {
    counter.add_tile(table.tiles()[t], result);
    poller.add_steps(1);
  }
  return result;
}

}  // namespace dilated

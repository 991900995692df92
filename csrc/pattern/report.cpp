// Counts the (query, key) pairs of a pattern: on paper, distinct, and as tiles compute them.
#include <dilated/pattern.h>

#include <algorithm>

#include "pattern/resolved.h"

namespace dilated {
namespace {

using pattern::ResolvedSpec;

struct Counter {
  const ResolvedSpec& spec;
  TableView table;
  int64_t column_tile;

  /// Columns of the group that the row at `last` may see.
  int64_t columns_through(const Group& group, int32_t origin, int32_t last) const {
    if (!spec.is_causal) {
      return group.columns;
    }
    int64_t columns = 0;
    for (int32_t j = 0; j < group.column_run_count; ++j) {
      columns += count_through(table.runs()[group.column_runs + j], origin, last);
    }
    return columns;
  }

  void add_tile(const Tile& tile, PatternReport& report) const {
    const Group& group = table.groups()[tile.group];
    const int32_t* begin = table.class_begin() + group.head_class;
    const int64_t heads = begin[1] - begin[0];
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
    const int64_t columns = columns_through(group, tile.origin, last);
    report.computed +=
        heads * spec.row_tile * ((columns + column_tile - 1) / column_tile * column_tile);
  }
};

/// Positions of the lattice first, first + rate, ... below x.
int64_t count_below(int64_t x, int64_t first, int64_t rate) {
  return x <= first ? 0 : (x - first + rate - 1) / rate;
}

/// Pairs of positions on a lattice, numbered along it.
int64_t count_pairs(const Range& queries, const Range& keys, bool is_causal) {
  if (!is_causal) {
    return (queries.end - queries.begin) * (keys.end - keys.begin);
  }
  int64_t pairs = 0;
  for (int64_t q = std::max(queries.begin, keys.begin); q < queries.end; ++q) {
    pairs += std::min(q + 1, keys.end) - keys.begin;
  }
  return pairs;
}

/// Pairs of one branch and head in a segment.
int64_t segment_pairs(const ResolvedSpec& spec, const Range& segment, int64_t offset,
                      int64_t rate) {
  const auto below = [&](int64_t x) {
    return count_below(std::clamp(x, segment.begin, segment.end), segment.begin + offset, rate);
  };
  const auto on_lattice = [&](const Range& stretch) {
    return Range{below(stretch.begin), below(stretch.end)};
  };
  int64_t pairs = 0;
  for (const Range& queries : spec.queries) {
    for (const Range& keys : spec.keys) {
      pairs += count_pairs(on_lattice(queries), on_lattice(keys), spec.is_causal);
    }
  }
  return pairs;
}

int64_t nominal_pairs(const ResolvedSpec& spec) {
  int64_t pairs = 0;
  for (const Branch& branch : spec.branches) {
    for (const int64_t offset : branch.head_offsets) {
      for (int64_t begin = 0; offset >= 0 && begin < spec.seq_len;) {
        const Range segment = spec.segment(branch, begin);
        pairs += segment_pairs(spec, segment, offset, branch.dilation_rate);
        begin = segment.end;
      }
    }
  }
  return pairs;
}

}  // namespace

PatternReport report(const PatternSpec& spec, const std::vector<int32_t>& words,
                     int64_t column_tile) {
  const PatternView view{words.data()};
  const TableView table = view.forward();
  PatternReport result{};
  const ResolvedSpec resolved(spec);
  result.nominal = nominal_pairs(resolved);
  result.bytes = static_cast<int64_t>(words.size() * sizeof(int32_t));
  result.tiles = table.table->tiles;
  result.groups = table.table->groups;
  result.runs = table.table->runs;
  const Counter counter{resolved, table, column_tile};
  for (int32_t t = 0; t < table.table->tiles; ++t) {
    counter.add_tile(table.tiles()[t], result);
  }
  return result;
}

}  // namespace dilated

// The planner: from branches and offsets to tile lists.
//
// The sequence is cut into *cells* at every branch's segment boundaries, so that all rows of a cell
// lie in the same segments. Within a cell a row's columns depend only on which branches it is in;
// rows in the same branches form a *group*. Where the boundaries around two cells look the same
// from inside, their groups are the same but for the origin and are stored once: with nested
// segments the table of groups does not grow with the sequence.
//
//   segments of branch 0    |-----|-----|-----|-----|-----|-----|-----|-----|
//   segments of branch 1    |-----------|-----------|-----------|-----------|
//   segments of branch 2    |-----------------------|-----------------------|
//   kinds of cells          |  a  |  b  |  c  |  d  |  a  |  b  |  c  |  d  |
//   spans                   |-----------------------|-----------------------|
#include <dilated/pattern.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "pattern/budget.h"
#include "pattern/cells.h"
#include "pattern/groups.h"

namespace dilated {
namespace {

using pattern::BranchShape;
using pattern::Budget;
using pattern::Cells;
using pattern::GroupPlanner;
using pattern::HeadClass;

Range resolve(const Range& range, int64_t seq_len) {
  return {range.begin, range.end == -1 ? seq_len : range.end};
}

/// One direction's lists before they are laid out. Rows are queries and columns keys, or the other
/// way round.
class TablePlanner {
 public:
  TablePlanner(const PatternSpec& spec, bool transposed, Budget& budget);
  Table write(std::vector<int32_t>& words) const;

 private:
  struct GroupRange {
    int32_t first, count;  // count -1: not planned yet
  };

  GroupRange groups_of(int32_t kind, int32_t head_class);
  void emit_span(size_t first_cell, size_t last_cell);
  void emit_tiles(int32_t group, int64_t origin);

  Budget& budget_;
  const int32_t row_tile_;
  const std::vector<HeadClass> classes_;
  Cells cells_;
  GroupPlanner planner_;
  std::vector<GroupRange> group_ranges_;  // [kinds, classes]
  std::vector<Tile> tiles_;
  std::vector<int32_t> span_tiles_;
};

std::vector<BranchShape> shapes_of(const PatternSpec& spec) {
  std::vector<BranchShape> shapes;
  for (size_t i = 0; i < spec.segment_lengths.size(); ++i) {
    const int64_t length = std::min(spec.segment_lengths[i], std::max<int64_t>(spec.seq_len, 1));
    shapes.push_back({length, spec.dilation_rates[i]});
  }
  return shapes;
}

Cells cells_of(const PatternSpec& spec, bool transposed, Budget& budget) {
  std::vector<int64_t> lengths;
  for (const BranchShape& shape : shapes_of(spec)) {
    lengths.push_back(shape.segment_length);
  }
  const Range queries = resolve(spec.queries, spec.seq_len);
  const Range keys = resolve(spec.keys, spec.seq_len);
  return transposed ? pattern::cut_cells(lengths, spec.seq_len, keys, queries, budget)
                    : pattern::cut_cells(lengths, spec.seq_len, queries, keys, budget);
}

TablePlanner::TablePlanner(const PatternSpec& spec, bool transposed, Budget& budget)
    : budget_(budget),
      row_tile_(static_cast<int32_t>(spec.row_tile)),
      classes_(pattern::classify_heads(spec, transposed ? spec.heads / spec.kv_heads : 1)),
      cells_(cells_of(spec, transposed, budget)),
      planner_(shapes_of(spec), !transposed && !spec.is_causal && spec.padding == Padding::kZeros,
               budget) {
  // Every cell has at least one tile for each class.
  budget_.need_bytes(static_cast<int64_t>(cells_.cells.size() * classes_.size() * sizeof(Tile)));
  group_ranges_.assign(cells_.kinds.size() * classes_.size(), {0, -1});
  for (size_t s = 0; s + 1 < cells_.spans.size(); ++s) {
    span_tiles_.push_back(static_cast<int32_t>(tiles_.size()));
    budget_.add_bytes(sizeof(int32_t));
    emit_span(cells_.spans[s], cells_.spans[s + 1]);
  }
  span_tiles_.push_back(static_cast<int32_t>(tiles_.size()));
}

TablePlanner::GroupRange TablePlanner::groups_of(int32_t kind, int32_t head_class) {
  const auto c = static_cast<size_t>(head_class);
  GroupRange& range = group_ranges_[static_cast<size_t>(kind) * classes_.size() + c];
  if (range.count < 0) {
    range.first = static_cast<int32_t>(planner_.groups().size());
    planner_.plan(cells_.kinds[static_cast<size_t>(kind)], classes_[c], head_class);
    range.count = static_cast<int32_t>(planner_.groups().size()) - range.first;
  }
  return range;
}

/// Of every cell and class the group with the longest lists, then of all of them the next one, so
/// that the short lists come last and fill the gaps.
void TablePlanner::emit_span(size_t first_cell, size_t last_cell) {
  bool found = true;
  for (int32_t rank = 0; found; ++rank) {
    found = false;
    for (size_t c = 0; c < classes_.size(); ++c) {
      budget_.add_steps(static_cast<int64_t>(last_cell - first_cell));
      for (size_t cell = first_cell; cell < last_cell; ++cell) {
        const GroupRange range = groups_of(cells_.cells[cell].kind, static_cast<int32_t>(c));
        if (rank < range.count) {
          found = true;
          emit_tiles(range.first + rank, cells_.cells[cell].begin);
        }
      }
    }
  }
}

void TablePlanner::emit_tiles(int32_t group, int64_t origin) {
  const int32_t rows = planner_.groups()[static_cast<size_t>(group)].rows;
  budget_.add_bytes((int64_t{rows} + row_tile_ - 1) / row_tile_ *
                    static_cast<int64_t>(sizeof(Tile)));
  for (int32_t row = 0; row < rows; row += row_tile_) {
    tiles_.push_back({group, static_cast<int32_t>(origin), row, std::min(rows - row, row_tile_)});
  }
}

/// Appends the items at a multiple of 16 bytes and returns where they begin, in words.
template <typename T>
int32_t append(std::vector<int32_t>& words, const std::vector<T>& items) {
  static_assert(sizeof(T) % sizeof(int32_t) == 0);
  const size_t at = words.size();
  const size_t size = items.size() * sizeof(T) / sizeof(int32_t);
  words.resize(at + (size + 3) / 4 * 4);
  if (words.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw std::invalid_argument("seq_len: the pattern would take 2^31 words or more");
  }
  if (size > 0) {
    std::memcpy(words.data() + at, items.data(), size * sizeof(int32_t));
  }
  return static_cast<int32_t>(at);
}

Table TablePlanner::write(std::vector<int32_t>& words) const {
  Table table{};
  std::vector<int32_t> begins{0};
  std::vector<int32_t> heads;
  for (const HeadClass& head_class : classes_) {
    const auto size = static_cast<int32_t>(head_class.heads.size());
    table.max_class_heads = std::max(table.max_class_heads, size);
    heads.insert(heads.end(), head_class.heads.begin(), head_class.heads.end());
    begins.push_back(static_cast<int32_t>(heads.size()));
  }
  begins.insert(begins.end(), heads.begin(), heads.end());
  table.classes = static_cast<int32_t>(classes_.size());
  table.spans = static_cast<int32_t>(cells_.spans.size()) - 1;
  table.tiles = static_cast<int32_t>(tiles_.size());
  table.groups = static_cast<int32_t>(planner_.groups().size());
  table.runs = static_cast<int32_t>(planner_.runs().size());
  table.class_heads_at = append(words, begins);
  table.span_tiles_at = append(words, span_tiles_);
  table.tiles_at = append(words, tiles_);
  table.groups_at = append(words, planner_.groups());
  table.runs_at = append(words, planner_.runs());
  return table;
}

Header header_of(const PatternSpec& spec) {
  const uint64_t hash = fingerprint(spec);
  const Range queries = resolve(spec.queries, spec.seq_len);
  const Range keys = resolve(spec.keys, spec.seq_len);
  Header header{};
  header.magic = kPatternMagic;
  header.fingerprint[0] = static_cast<uint32_t>(hash);
  header.fingerprint[1] = static_cast<uint32_t>(hash >> 32);
  header.seq_len = static_cast<int32_t>(spec.seq_len);
  header.heads = static_cast<int32_t>(spec.heads);
  header.kv_heads = static_cast<int32_t>(spec.kv_heads);
  header.row_tile = static_cast<int32_t>(spec.row_tile);
  header.is_causal = spec.is_causal ? 1 : 0;
  header.branches = static_cast<int32_t>(spec.segment_lengths.size());
  header.query_begin = static_cast<int32_t>(queries.begin);
  header.query_end = static_cast<int32_t>(queries.end);
  header.key_begin = static_cast<int32_t>(keys.begin);
  header.key_end = static_cast<int32_t>(keys.end);
  return header;
}

}  // namespace

std::vector<int32_t> plan(const PatternSpec& spec, const std::function<void()>& poll) {
  validate(spec);
  Budget budget(spec, poll);
  Header header = header_of(spec);
  std::vector<int32_t> words(sizeof(Header) / sizeof(int32_t));
  header.forward = TablePlanner(spec, /*transposed=*/false, budget).write(words);
  // "In the same segment, on the same lattice" is symmetric: only grouped heads and unequal ranges
  // need other lists for the transpose.
  const bool is_symmetric = spec.heads == spec.kv_heads && header.query_begin == header.key_begin &&
                            header.query_end == header.key_end;
  header.transposed =
      is_symmetric ? header.forward : TablePlanner(spec, /*transposed=*/true, budget).write(words);
  header.words = static_cast<int32_t>(words.size());
  std::memcpy(words.data(), &header, sizeof(header));
  const uint64_t sum = checksum(words.data(), header.words);
  header.checksum[0] = static_cast<uint32_t>(sum);
  header.checksum[1] = static_cast<uint32_t>(sum >> 32);
  std::memcpy(words.data(), &header, sizeof(header));
  return words;
}

}  // namespace dilated

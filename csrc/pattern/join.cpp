#include "pattern/join.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "pattern/words.h"

namespace dilated {
namespace pattern {
namespace {

constexpr int64_t kWordBytes = sizeof(int32_t);
constexpr int64_t kMaxWords = std::numeric_limits<int32_t>::max();

int64_t class_words(const TableView& table) {
  return table.table->classes + 1 + table.class_begin()[table.table->classes];
}

/// What a length's table adds to the batch's.
int64_t words_of(const Table& table, int64_t sequences) {
  const int64_t once = table.groups * int64_t{sizeof(Group)} + table.runs * int64_t{sizeof(Run)} +
                       table.windows * int64_t{sizeof(Window)};
  const int64_t each = table.tiles * int64_t{sizeof(Tile)} + (table.spans + 1) * kWordBytes;
  return (once + sequences * (each + kWordBytes)) / kWordBytes;
}

/// Appends the same list of every part; change(item, i) moves the indices of part i's.
template <typename T, typename Parts, typename Items, typename Change>
int32_t append_lists(const Parts& parts, int32_t Table::* count, Items items,
                     std::vector<int32_t>& words, Change change) {
  const auto at = static_cast<int32_t>(words.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    for (T& item : extend<T>(words, (parts[i].*items)(), parts[i].table->*count)) {
      change(item, i);
    }
  }
  align(words);
  return at;
}

}  // namespace

Joiner::Joiner(const PatternSpec& spec) : spec_(spec), one_(one_sequence(spec, 0)) {
  validate(spec);
  if (!is_whole(spec)) {
    throw std::invalid_argument(
        "sequences: must be joined where queries and keys are the whole batch, got ranges of it");
  }
  const std::vector<Sequence>& sequences = *spec.sequences;
  std::vector<int32_t> order(sequences.size());
  std::iota(order.begin(), order.end(), 0);
  const auto length = [&](int32_t i) { return sequences[static_cast<size_t>(i)].length; };
  std::erase_if(order, [&](int32_t i) { return length(i) == 0; });
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return length(a) > length(b); });
  for (const int32_t i : order) {
    if (lengths_.empty() || lengths_.back() != length(i)) {
      lengths_.push_back(length(i));
      counts_.push_back(0);
    }
    ++counts_.back();
    placed_.push_back(
        {lengths_.size() - 1, i, static_cast<int32_t>(sequences[static_cast<size_t>(i)].first)});
  }
  if (lengths_.empty()) {  // the classes of heads are those of any length
    lengths_.push_back(0);
    counts_.push_back(0);
  }
  constexpr int64_t kAlignment = 3 * 2 * 7;  // of the lists of both tables
  words_ = static_cast<int64_t>(begin_words().size()) + kAlignment +
           2 * (2 * spec.heads + 1);  // at most a class for each head
}

void Joiner::add(const int32_t* words) {
  const PatternView part{words};
  const Header& header = part.header();
  one_.seq_len = lengths_.at(parts_.size());
  const auto wanted = static_cast<int32_t>(spec_.directions);
  const bool is_part = header.magic == kPatternMagic &&
                       dilated::join(header.fingerprint) == fingerprint(one_) &&
                       (directions_of(header) & wanted) == wanted;
  if (!is_part) {
    throw std::invalid_argument(
        "parts: must be the patterns of the batch's lengths, the longest first, got another for " +
        std::to_string(one_.seq_len));
  }
  words_ += words_of(header.forward, counts_[parts_.size()]);
  words_ += is_symmetric(one_) ? 0 : words_of(header.transposed, counts_[parts_.size()]);
  check_words(words_);
  parts_.push_back(part);
}

void Joiner::check_words(int64_t words) const {
  if (const int64_t limit = std::min(max_pattern_bytes() / kWordBytes, kMaxWords); words > limit) {
    throw std::invalid_argument(
        "sequences: must give a pattern of at most " + std::to_string(limit * kWordBytes) +
        " bytes (max_pattern_bytes), got a larger one for " +
        std::to_string(spec_.sequences->size()) +
        " sequences: take fewer at once, or raise the limit by set_max_pattern_bytes");
  }
}

/// All to one height, as kernels want them, which is noted in `table`. Lengths chose for
/// themselves.
Joiner::Parts Joiner::cut_parts(Direction direction, int64_t& planned, Table& table) const {
  Parts parts;
  Computed computed;
  for (size_t i = 0; i < parts_.size(); ++i) {
    const TableView view = (parts_[i].*direction)();
    const auto& [tall, low] = view.table->computed;
    computed.add({tall, low}, counts_[i]);
    parts.push_back({view,
                     {view.tiles(), static_cast<size_t>(view.table->tiles)},
                     {view.span_tiles(), static_cast<size_t>(view.table->spans) + 1}});
  }
  note_tiling(spec_.row_tile.value_or(choose_row_tile(computed)), computed, table);
  for (size_t i = 0; i < parts_.size(); ++i) {
    Part& part = parts[i];
    if (part.table->row_tile != table.row_tile) {
      part.again = cut_again(part, table.row_tile);
      part.cut = part.again.tiles;
      part.cut_spans = part.again.span_tiles;
      planned += counts_[i] * (std::ssize(part.cut) - part.table->tiles) * int64_t{sizeof(Tile)} /
                 kWordBytes;
      check_words(planned);
    }
  }
  return parts;
}

std::vector<int32_t> Joiner::join() const {
  std::vector<int32_t> words = begin_words();
  words.reserve(static_cast<size_t>(words_));
  int64_t planned = words_;  // and what cutting tiles again adds, of both tables
  const bool one_for_both = is_symmetric(one_);
  Table forward{}, transposed{};
  if (asks_for(spec_, Directions::kForward) || one_for_both) {
    forward = join(&PatternView::forward, planned, words);
  }
  if (one_for_both) {
    transposed = forward;
  } else if (asks_for(spec_, Directions::kTransposed)) {
    transposed = join(&PatternView::transposed, planned, words);
  }
  seal(spec_, forward, transposed, words);
  return words;
}

Table Joiner::join(Direction direction, int64_t& planned, std::vector<int32_t>& words) const {
  Table table{};
  const Parts parts = cut_parts(direction, planned, table);
  std::vector<Before> before{{0, 0, 0}};
  for (const Part& part : parts) {
    table.groups += part.table->groups;
    table.runs += part.table->runs;
    table.windows += part.table->windows;
    before.push_back({table.groups, table.runs, table.windows});
  }
  for (const Placed& placed : placed_) {
    table.tiles += static_cast<int32_t>(parts[placed.part].cut.size());
    table.spans += parts[placed.part].table->spans;
  }
  table.classes = parts[0].table->classes;
  table.max_class_heads = parts[0].table->max_class_heads;
  table.stretches = static_cast<int32_t>(placed_.size());
  table.class_heads_at = static_cast<int32_t>(words.size());
  extend(words, parts[0].class_begin(), class_words(parts[0]));
  align(words);
  table.span_tiles_at = append_spans(parts, words);
  std::vector<int32_t> shifts;
  shifts.reserve(placed_.size());
  for (const Placed& placed : placed_) {
    shifts.push_back(placed.first);
  }
  table.shifts_at = append(words, shifts);
  table.windows_at = append_lists<Window>(parts, &Table::windows, &TableView::windows, words,
                                          [](Window& /*window*/, size_t /*part*/) {});
  table.tiles_at = append_tiles(parts, before, words);
  table.groups_at = append_lists<Group>(parts, &Table::groups, &TableView::groups, words,
                                        [&](Group& group, size_t part) {
                                          group.row_runs += before[part].runs;
                                          group.column_runs += before[part].runs;
                                        });
  table.runs_at = append_lists<Run>(parts, &Table::runs, &TableView::runs, words,
                                    [](Run& /*run*/, size_t /*part*/) {});
  return table;
}

int32_t Joiner::append_spans(const Parts& parts, std::vector<int32_t>& words) const {
  std::vector<int32_t> spans{0};
  for (const Placed& placed : placed_) {
    const int32_t begin = spans.back();
    for (const int32_t tiles : parts[placed.part].cut_spans.subspan(1)) {
      spans.push_back(begin + tiles);
    }
  }
  return append(words, spans);
}

/// A part has one stretch of columns, which begins at position 0.
int32_t Joiner::append_tiles(const Parts& parts, const std::vector<Before>& before,
                             std::vector<int32_t>& words) const {
  const auto at = static_cast<int32_t>(words.size());
  for (size_t i = 0; i < placed_.size(); ++i) {
    const auto [part, sequence, first] = placed_[i];
    for (Tile& tile : extend(words, parts[part].cut.data(), std::ssize(parts[part].cut))) {
      tile.group += before[part].groups;
      tile.row_shift += first;
      tile.first_stretch += static_cast<int32_t>(i);
      tile.first_window += tile.first_window < 0 ? 0 : before[part].windows;
      tile.sequence = sequence;
    }
  }
  return at;
}

}  // namespace pattern

std::vector<int64_t> sequence_lengths(const PatternSpec& spec) {
  return pattern::Joiner(spec).lengths();
}

PatternSpec one_sequence(const PatternSpec& spec, int64_t length) {
  PatternSpec one;
  one.seq_len = length;
  one.branches = spec.branches;
  one.heads = spec.heads;
  one.kv_heads = spec.kv_heads;
  one.is_causal = spec.is_causal;
  one.padding = spec.padding;
  one.row_tile = spec.row_tile;
  one.directions = spec.directions;
  return one;
}

std::vector<int32_t> join_sequences(const PatternSpec& spec,
                                    const std::vector<const int32_t*>& parts) {
  pattern::Joiner joiner(spec);
  if (parts.size() != joiner.lengths().size()) {
    throw std::invalid_argument("parts: must be one for each of the batch's " +
                                std::to_string(joiner.lengths().size()) +
                                " distinct lengths, got " + std::to_string(parts.size()));
  }
  for (const int32_t* part : parts) {
    joiner.add(part);
  }
  return joiner.join();
}

}  // namespace dilated

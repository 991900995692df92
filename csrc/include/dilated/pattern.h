// Who attends to whom, as data. No torch and no CUDA here.
#pragma once

#include <dilated/export.h>
#include <dilated/pattern_layout.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

namespace dilated {

enum class Padding : int32_t {
  kMasked,  // keys beyond the sequence do not exist
  kZeros,   // torchscale's: a segment that is cut short counts its missing keys as keys of score 0
            // and value 0
};

/// Positions begin <= p < end; end = -1 stands for the sequence's end.
struct Range {
  int64_t begin = 0;
  int64_t end = -1;
  bool operator==(const Range&) const = default;
};

/// Which query rows a pattern has, where keys lie in two tensors.
enum class QueryRows : int32_t {
  kAll,
  kNear,  // those that meet no key of the second tensor
  kFar,   // the others
};

/// One of a batch: rows first .. first + length - 1 of the tensors are its positions 0, 1, ...
struct Sequence {
  int64_t first = 0;
  int64_t length = 0;
  bool operator==(const Sequence&) const = default;
};

/// Segments of `segment_length` positions, w, of which every `dilation_rate`-th, r, takes part: for
/// head h those with (p mod w) mod r = head_offsets[h].
struct Branch {
  int64_t segment_length = 1;
  int64_t dilation_rate = 1;
  std::vector<int64_t> head_offsets{};  // [heads]; -1: not in this branch; empty: the paper's
};

/// Which tables a pattern has (pattern_layout.h): the forward pass reads the forward table, the
/// backward both. Where heads = kv_heads and queries = keys, one table serves as both.
enum class Directions : int32_t { kForward = 1, kTransposed = 2, kBoth = 3 };

/// Rows of a table's tiles, as kernels take them.
inline constexpr int64_t kRowTile = 64;

/// The same where most groups are so short that the larger tiles would stay empty.
inline constexpr int64_t kShortRowTile = 16;

/// Everything that a pattern depends on.
struct PatternSpec {
  int64_t seq_len = 0;
  std::vector<Branch> branches;
  int64_t heads = 1;
  int64_t kv_heads = 1;
  bool is_causal = false;
  Padding padding = Padding::kMasked;
  // The positions of the tensors' rows: stretches of the sequence, in its order, that don't
  // overlap. In a ring they are a shard of it.
  std::vector<Range> queries{Range{}};
  std::vector<Range> keys{Range{}};  // of key and value
  // More keys, in tensors of their own, and which of the queries to plan: of either there is a
  // forward table only.
  std::vector<Range> far_keys{};
  QueryRows rows = QueryRows::kAll;
  // Neither is in the fingerprint: the words say which. Without a row_tile the planner chooses one
  // of the above for each table, by its groups.
  std::optional<int64_t> row_tile = std::nullopt;
  Directions directions = Directions::kBoth;
  // Of a batch that lies in seq_len rows: ascending, without overlap. Each is as if alone, with
  // segments and zero keys of its own length; rows of none are in no list. The ranges above then
  // count through the batch's rows.
  std::optional<std::vector<Sequence>> sequences = std::nullopt;
};

/// The paper's offsets: head h takes h mod r. [heads].
DILATED_API std::vector<int64_t> interleaved_offsets(int64_t dilation_rate, int64_t heads);

/// torchscale's offsets: head h takes h // ceil(heads / r). [heads].
DILATED_API std::vector<int64_t> blocked_offsets(int64_t dilation_rate, int64_t heads);

/// Throws std::invalid_argument, which names the field, what must hold and what was given.
DILATED_API void validate(const PatternSpec& spec);

/// Whether queries and keys are the whole sequence, or batch.
DILATED_API bool is_whole(const PatternSpec& spec);

/// Equal for equal specifications; stored in the pattern's header. Branches count as clipped to the
/// sequence.
DILATED_API uint64_t fingerprint(const PatternSpec& spec);

/// The pattern's words (pattern_layout.h). Throws std::invalid_argument as validate() does, and if
/// the pattern would be larger than max_pattern_bytes(). `poll`, if given, is called every few
/// milliseconds; what it throws ends the planning.
DILATED_API std::vector<int32_t> plan(const PatternSpec& spec,
                                      const std::function<void()>& poll = {});

/// The distinct lengths of spec.sequences, the longest first, 0 only where there is no other. This
/// and what follows are for batches of which the pattern is_whole().
DILATED_API std::vector<int64_t> sequence_lengths(const PatternSpec& spec);

/// One sequence of such a length, alone.
DILATED_API PatternSpec one_sequence(const PatternSpec& spec, int64_t length);

/// The words of one_sequence() of each of the lengths, planned on several threads. Throws and polls
/// as plan() does.
DILATED_API std::vector<std::vector<int32_t>> plan_lengths(const PatternSpec& spec,
                                                           const std::vector<int64_t>& lengths,
                                                           const std::function<void()>& poll = {});

/// As plan(spec), of a specification with sequences, from what was planned before: parts[i] are the
/// words of one_sequence() of the i-th of sequence_lengths(). Throws std::invalid_argument as
/// plan() does, and if parts are not that.
DILATED_API std::vector<int32_t> join_sequences(const PatternSpec& spec,
                                                const std::vector<const int32_t*>& parts);

/// The most bytes that a pattern may take, 2^29 unless set; for the whole process. Planning takes
/// at most a few times as many, and its steps are bounded in proportion: whether a specification
/// can be planned depends on it and on this number alone.
DILATED_API int64_t max_pattern_bytes();

/// Throws std::invalid_argument for a number below 1.
DILATED_API void set_max_pattern_bytes(int64_t bytes);

/// The sum that plan() stores in the header. `size` counts words, a multiple of 4.
DILATED_API uint64_t checksum(const int32_t* words, int64_t size);

/// Whether the words are what plan() made, for any specification: by length and checksum.
DILATED_API bool is_planned(const int32_t* words, int64_t size);

/// Columns that kernels take at once, beside the rows of a tile.
constexpr int64_t column_tile(int64_t row_tile) { return row_tile == kShortRowTile ? 32 : 64; }

/// (query, key) pairs over all heads; the kernels' work is proportional to `computed`.
struct PatternReport {
  int64_t nominal;   // every branch on its own, of kAll rows
  int64_t distinct;  // each pair once, however many branches hold it
  int64_t computed;  // what tiles of row_tile x column_tile compute, their empty corners included
  int64_t bytes;     // of the pattern
  int64_t tiles, groups, runs;
};
/// Counts the pairs of `words`, which must have the forward table. `poll` is called now and then,
/// as by plan().
DILATED_API PatternReport report(const PatternSpec& spec, const std::vector<int32_t>& words,
                                 const std::function<void()>& poll = {});

}  // namespace dilated

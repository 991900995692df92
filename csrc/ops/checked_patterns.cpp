#include "ops/checked_patterns.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>

#include "ops/checks.h"
#include "ops/of_process.h"

namespace dilated::ops {
namespace {

PlannedFor read_header(const int32_t* words) {
  const Header& header = PatternView{words}.header();
  return {join(header.fingerprint), directions_of(header), row_tiles_of(header)};
}

const char* directions_name(int32_t directions) {
  constexpr std::array<const char*, 4> kNames{"no table", "the forward table",
                                              "the transposed table", "both tables (directions)"};
  return kNames[static_cast<size_t>(directions)];
}

}  // namespace

std::optional<PlannedFor> CheckedPatterns::find(const at::Tensor& pattern) {
  if (pattern.is_inference()) {
    return std::nullopt;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = entries_.find(pattern.const_data_ptr());
  if (found == entries_.end()) {
    return std::nullopt;
  }
  const Entry& entry = found->second;
  const bool is_same =
      entry.words == pattern.numel() &&
      entry.version == static_cast<uint32_t>(pattern._version()) &&
      entry.storage._unsafe_get_target() == pattern.storage().unsafeGetStorageImpl();
  return is_same ? std::optional(entry.planned) : std::nullopt;
}

void CheckedPatterns::insert(const at::Tensor& pattern, const PlannedFor& planned) {
  if (pattern.is_inference()) {
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (entries_.size() >= purge_at_) {
    std::erase_if(entries_, [](const auto& item) { return item.second.storage.expired(); });
    purge_at_ = std::max<size_t>(64, 2 * entries_.size());
  }
  entries_.insert_or_assign(pattern.const_data_ptr(),
                            Entry{pattern.storage().getWeakStorageImpl(), pattern.numel(),
                                  static_cast<uint32_t>(pattern._version()), planned});
}

CheckedPatterns& checked_patterns() { return of_process<CheckedPatterns>(); }

void check_layout(const at::Tensor& pattern, const char* name) {
  constexpr int64_t kHeaderWords = sizeof(Header) / sizeof(int32_t);
  TORCH_CHECK_VALUE(pattern.numel() >= kHeaderWords && pattern.is_contiguous(), name,
                    ": must be contiguous with at least ", kHeaderWords, " numbers, got ",
                    pattern.sizes(), " with strides ", pattern.strides());
}

void check_contents(const at::Tensor& pattern, const PatternSpec& spec) {
  check_layout(pattern, "pattern");
  if (pattern.is_cpu()) {
    // At every call, as it is cheap beside the call: torch doesn't count writes through NumPy.
    const auto* words = pattern.const_data_ptr<int32_t>();
    check_planned(is_planned(words, pattern.numel()));
    check_planned_for(read_header(words), spec);
  } else {
    check_aligned(pattern, "pattern");  // place_pattern() does the rest there
  }
}

PlannedFor checked_header(const at::Tensor& pattern) {
  if (const auto known = checked_patterns().find(pattern)) {
    return *known;
  }
  const auto* words = pattern.const_data_ptr<int32_t>();
  check_planned(is_planned(words, pattern.numel()));
  const PlannedFor planned = read_header(words);
  checked_patterns().insert(pattern, planned);
  return planned;
}

void check_planned(bool is_planned) {
  TORCH_CHECK_VALUE(is_planned,
                    "pattern: must hold the words that plan() made, unchanged, got words whose "
                    "length or checksum is not the header's");
}

void check_planned_for(const PlannedFor& planned, const PatternSpec& spec) {
  TORCH_CHECK_VALUE(
      planned.fingerprint == fingerprint(spec),
      "pattern: must be planned for the arguments of the call (seq_len, ranges of queries and "
      "keys, heads, branches, offsets, is_causal, padding, sequences), got one for others than "
      "seq_len ",
      spec.seq_len, ", heads ", spec.heads, " and so on");
  const auto reads = static_cast<int32_t>(spec.directions);
  TORCH_CHECK_VALUE((planned.directions & reads) == reads, "pattern: must have ",
                    directions_name(reads), " for this pass, got ",
                    directions_name(planned.directions));
  for (const int32_t row_tile : {planned.row_tiles.forward, planned.row_tiles.transposed}) {
    TORCH_CHECK_VALUE(row_tile == kRowTile || row_tile == kShortRowTile || row_tile == 0,
                      "pattern: must have tiles of ", kRowTile, " or ", kShortRowTile,
                      " rows (row_tile), got ", row_tile);
  }
}

}  // namespace dilated::ops

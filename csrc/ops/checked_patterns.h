// Whether patterns that callers pass are as they were planned, and for the call.
#pragma once

#include <ATen/core/Tensor.h>
#include <dilated/pattern.h>
#include <dilated/pattern_layout.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <unordered_map>

namespace dilated::ops {

/// What the header of a pattern says that it was planned for.
struct PlannedFor {
  uint64_t fingerprint;
  int32_t directions;  // directions_of() its header
  RowTiles row_tiles;
};

/// Remembers checked patterns, so that one that serves many calls on a device, or is copied to one
/// many times, is read once. A pattern is known by its storage, its words' address and number, and
/// the count of writes to it. The weak reference keeps the storage object's address, but not its
/// memory, from being reused. Any thread may call.
class CheckedPatterns {
 public:
  /// What the pattern was planned for, if it was checked and not written to since.
  std::optional<PlannedFor> find(const at::Tensor& pattern);

  /// The pattern was checked. Not remembered where torch doesn't count the writes to it.
  void insert(const at::Tensor& pattern, const PlannedFor& planned);

 private:
  struct Entry {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    int64_t words;
    uint32_t version;
    PlannedFor planned;
  };

  std::mutex mutex_;
  std::unordered_map<const void*, Entry> entries_;  // by the address of the words
  size_t purge_at_ = 64;  // entries at which those whose storage is gone are dropped
};

/// The process's.
CheckedPatterns& checked_patterns();

/// That the words are contiguous and enough for a header.
void check_layout(const at::Tensor& pattern, const char* name);

/// Compares a pattern that the caller passed with the call: on the CPU all of it, elsewhere only
/// its layout.
void check_contents(const at::Tensor& pattern, const PatternSpec& spec);

/// Checks a pattern on the CPU that is copied to a device; what it was planned for.
PlannedFor checked_header(const at::Tensor& pattern);

/// The errors of check_contents and of a device's check.
void check_planned(bool is_planned);
void check_planned_for(const PlannedFor& planned, const PatternSpec& spec);

}  // namespace dilated::ops

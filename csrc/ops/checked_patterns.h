// Whether patterns that callers pass are as they were planned, and for the call.
#pragma once

#include <ATen/core/Tensor.h>
#include <dilated/pattern.h>

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
};

/// Remembers what was checked, so that a pattern that serves many calls on a device, or is copied
/// to one many times, is read once. A pattern is its storage, the words of it, and the number of
/// times it was written to: the weak reference keeps the storage's address from being given to
/// another, but not its memory. Any thread may call.
class CheckedPatterns {
 public:
  /// Of a pattern that was checked as it is now.
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
  size_t purge_at_ = 64;  // entries, at which those are dropped whose storage is gone
};

/// The process's.
CheckedPatterns& checked_patterns();

/// That the words lie one after the other, and are enough for a header.
void check_layout(const at::Tensor& pattern, const char* name);

/// A pattern that the caller passed against the call, as far as the host can read it: all of it on
/// the CPU.
void check_contents(const at::Tensor& pattern, const PatternSpec& spec);

/// Of a pattern on the CPU that is copied to a device, once it is known to be as planned.
PlannedFor checked_header(const at::Tensor& pattern);

/// What check_contents and a device's check say of a wrong pattern.
void check_planned(bool is_planned);
void check_planned_for(const PlannedFor& planned, const PatternSpec& spec);

}  // namespace dilated::ops

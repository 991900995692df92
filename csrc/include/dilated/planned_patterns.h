// The patterns that the operators planned for calls without one, kept for equal calls by whole
// specification and device. No torch and no CUDA here.
//
// The least recently used goes first. What a CUDA graph captured stays for ever, since replays read
// it, and does not count towards the bounds. A forked process begins with none. Any thread may
// call.
#pragma once

#include <dilated/export.h>

#include <cstdint>

namespace dilated {

/// What is held, including what is pinned for graphs, and the counts since the last clearing. A
/// call that waits for another thread's plan is a hit.
struct PlannedPatternCounts {
  int64_t entries, bytes, pinned_entries, pinned_bytes;
  int64_t hits, misses, evictions;
};
DILATED_API PlannedPatternCounts planned_pattern_counts();

/// Sets the bounds, 128 patterns and 256 MiB at first, and evicts what no longer fits; with 0 every
/// call plans. Throws std::invalid_argument for a number below 0.
DILATED_API void resize_planned_patterns(int64_t max_entries, int64_t max_bytes);

/// Drops all but what graphs captured, and the counts.
DILATED_API void clear_planned_patterns();

}  // namespace dilated

// The operators' side of dilated/planned_patterns.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>
#include <c10/util/SmallVector.h>
#include <dilated/pattern.h>
#include <dilated/pattern_layout.h>
#include <dilated/planned_patterns.h>

#include <condition_variable>
#include <functional>
#include <list>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "ops/attention_call.h"

namespace dilated::ops {

/// New words, as a tensor on the CPU.
at::Tensor keep_on_host(std::vector<int32_t>&& words, const at::Device& device);

/// How a call on a device reads a pattern.
struct PatternReader {
  /// New words, on the device and ready for all of its streams.
  at::Tensor (*keep)(std::vector<int32_t>&& words, const at::Device& device) = &keep_on_host;
  std::optional<c10::Stream> stream =
      std::nullopt;          // on which the call reads them; none on the CPU
  bool is_captured = false;  // by a CUDA graph, whose replays read them again
};

/// A planned pattern, and what its words, which may be on a device, say of it.
struct LentPattern {
  at::Tensor words;
  RowTiles row_tiles;
};

class PlannedPatterns {
 public:
  /// The words for a checked call (check_call) without a pattern, found or planned; threads that
  /// miss a pattern at once plan it once. Nobody outside the operators gets them, so they need no
  /// checks. `reads`: the tables that the pass reads. A batch of sequences is joined of the
  /// patterns of its lengths, which are kept as well, on the host. Throws as spec_of(), plan() and
  /// reader.keep do.
  LentPattern lend(const AttentionCall& call, Directions reads, const PatternReader& reader = {});

  PlannedPatternCounts counts();
  void evict();
  void clear();

 private:
  using Key = c10::SmallVector<int64_t, 64>;  // the device and the specification, number by number
  struct Hash {
    size_t operator()(const Key& key) const;
  };
  struct Entry {
    LentPattern lent{};  // words undefined while a thread plans
    bool is_pinned = false;
    c10::SmallVector<c10::Stream, 2> streams;  // which read the words
    std::list<const Key*>::iterator place;     // in recent_, but for a pinned one
  };
  using Entries = std::unordered_map<Key, Entry, Hash>;

  static Key key_of(const AttentionCall& call, Directions directions, const at::Device& device,
                    int64_t rows);
  using Plan = std::function<std::vector<int32_t>()>;

  LentPattern lend(const Key& key, const at::Device& device, const PatternReader& reader,
                   const Plan& plan);
  LentPattern fill(Entries::value_type& item, const at::Device& device, const PatternReader& reader,
                   const Plan& plan);
  std::vector<int32_t> plan(const AttentionCall& call, Directions reads);
  LentPattern hand_out(Entry& entry, const PatternReader& reader);
  void pin(Entry& entry);
  void evict_to(int64_t max_entries, int64_t max_bytes);

  std::mutex mutex_;
  std::condition_variable planned_;  // or failed to
  Entries entries_;
  std::list<const Key*> recent_;   // most recently used first
  PlannedPatternCounts counts_{};  // but for `entries`
};

/// The process's.
PlannedPatterns& planned_patterns();

}  // namespace dilated::ops

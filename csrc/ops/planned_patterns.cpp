#include "ops/planned_patterns.h"

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <ATen/record_function.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>

#include "ops/checks.h"
#include "ops/of_process.h"

namespace dilated {
namespace ops {
namespace {

std::atomic<int64_t> max_entries{128};
std::atomic<int64_t> max_bytes{int64_t{256} << 20};

int64_t bytes_of(const at::Tensor& words) { return static_cast<int64_t>(words.nbytes()); }

LentPattern keep(std::vector<int32_t>&& words, const at::Device& device,
                 const PatternReader& reader) {
  const RowTiles row_tiles = row_tiles_of(PatternView{words.data()}.header());
  return {reader.keep(std::move(words), device), row_tiles};
}

}  // namespace

at::Tensor keep_on_host(std::vector<int32_t>&& words, const at::Device& /*device*/) {
  auto* kept = new std::vector<int32_t>(std::move(words));
  return at::from_blob(
      kept->data(), {static_cast<int64_t>(kept->size())}, [kept](void*) { delete kept; },
      at::TensorOptions().dtype(at::kInt));
}

size_t PlannedPatterns::Hash::operator()(const Key& key) const {
  uint64_t hash = key.size();
  for (const int64_t number : key) {
    hash = (hash ^ static_cast<uint64_t>(number)) * 0x9e3779b97f4a7c15ull;
    hash ^= hash >> 32;
  }
  return hash;
}

/// All that spec_of() reads but call.sequences, for so many rows. Offsets count only if given, so
/// one pattern may have two keys.
PlannedPatterns::Key PlannedPatterns::key_of(const AttentionCall& call, Directions directions,
                                             const at::Device& device, int64_t rows) {
  const bool is_block = call.block.has_value();
  const int64_t key_rows = is_block ? call.key.size(1) : rows;
  const bool is_square =
      !is_block || (rows == key_rows && call.block->queries == call.block->keys && !call.far);
  const bool is_symmetric = is_square && call.query.size(2) == call.key.size(2);
  Key key{static_cast<int64_t>(device.type()), device.index(), rows, call.query.size(2), key_rows,
          call.key.size(2), is_block ? call.block->seq_len : rows, call.is_causal,
          call.padding == "zeros",
          // A symmetric pattern's one table serves both passes.
          static_cast<int64_t>(is_symmetric ? Directions::kBoth : directions),
          static_cast<int64_t>(call.segment_lengths.size()), call.head_offsets.has_value()};
  for (const c10::SymInt& length : call.segment_lengths) {
    key.push_back(length.expect_int());
  }
  key.append(call.dilation_rates.begin(), call.dilation_rates.end());
  const AttentionBlock whole;
  const FarKeys none;
  const AttentionBlock& block = is_block ? *call.block : whole;
  const FarKeys& far = call.far.has_value() ? *call.far : none;
  for (const auto* list : {&block.queries, &block.keys, &far.keys}) {
    key.push_back(static_cast<int64_t>(list->size()));
    key.append(list->begin(), list->end());
  }
  key.append(
      {far.key.has_value() ? far.key->size(1) : 0, static_cast<int64_t>(query_rows_of(call))});
  if (call.head_offsets.has_value()) {
    const at::Tensor table = call.head_offsets->contiguous();
    const auto* offsets = table.const_data_ptr<int64_t>();
    key.append(offsets, offsets + table.numel());
  }
  return key;
}

LentPattern PlannedPatterns::lend(const AttentionCall& call, Directions reads,
                                  const PatternReader& reader) {
  const at::Device device = call.query.device();
  Key key = key_of(call, wanted_directions(call, reads), device, call.query.size(1));
  if (call.sequences.has_value()) {  // those of one sequence end before this
    for (const auto& [first, length] : sequences_of(*call.sequences)) {
      key.append({first, length});
    }
    key.push_back(call.sequences->size(0));
  }
  return lend(key, device, reader, [&] { return plan(call, reads); });
}

LentPattern PlannedPatterns::lend(const Key& key, const at::Device& device,
                                  const PatternReader& reader, const Plan& plan) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    const auto [item, is_new] = entries_.try_emplace(key);
    if (is_new) {
      ++counts_.misses;
      Entries::value_type& planned = *item;
      lock.unlock();
      return fill(planned, device, reader, plan);
    }
    const at::Tensor& words = item->second.lent.words;
    if (!words.defined()) {
      planned_.wait(lock);
    } else if (bytes_of(words) <= max_pattern_bytes()) {
      ++counts_.hits;
      return hand_out(item->second, reader);
    } else {
      lock.unlock();
      return keep(plan(), device, reader);  // throws: it has become too large
    }
  }
}

/// Not locked. The entry stays where it is: nobody else removes one without words.
LentPattern PlannedPatterns::fill(Entries::value_type& item, const at::Device& device,
                                  const PatternReader& reader, const Plan& plan) {
  RECORD_FUNCTION("dilated::plan", {});
  LentPattern planned{};
  try {
    TORCH_CHECK(!reader.is_captured,
                "pattern: must be given, on query's device, while a CUDA graph is captured, got "
                "None: one that is planned on the spot comes from host memory that a replay would "
                "not find");
    planned = keep(plan(), device, reader);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.erase(Key(item.first));
    planned_.notify_all();
    throw;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  item.second.lent = planned;
  item.second.place = recent_.insert(recent_.begin(), &item.first);
  counts_.bytes += bytes_of(planned.words);
  planned_.notify_all();
  planned = hand_out(item.second, reader);
  evict_to(max_entries, max_bytes);
  return planned;
}

/// Not locked.
std::vector<int32_t> PlannedPatterns::plan(const AttentionCall& call, Directions reads) {
  const PatternSpec spec = spec_of(call, reads);
  if (!spec.sequences.has_value() || !is_whole(spec)) {
    return dilated::plan(spec);
  }
  AttentionCall whole = call;  // a sequence is no block, though all of a batch may be called one
  whole.block.reset();
  whole.far.reset();
  const std::vector<int64_t> lengths = sequence_lengths(spec);
  std::vector<LentPattern> parts(lengths.size());
  at::parallel_for(0, static_cast<int64_t>(lengths.size()), 1, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      parts[i] = lend(key_of(whole, spec.directions, at::kCPU, lengths[i]), at::kCPU, {},
                      [&] { return dilated::plan(one_sequence(spec, lengths[i])); });
    }
  });
  std::vector<const int32_t*> words;
  words.reserve(parts.size());
  for (const LentPattern& part : parts) {
    words.push_back(part.words.const_data_ptr<int32_t>());
  }
  return join_sequences(spec, words);
}

/// Locked. Keeps the words' memory from reuse before the reader's stream is done.
LentPattern PlannedPatterns::hand_out(Entry& entry, const PatternReader& reader) {
  if (!entry.is_pinned) {
    recent_.splice(recent_.begin(), recent_, entry.place);
    if (reader.is_captured) {
      pin(entry);
    } else if (reader.stream.has_value() && std::find(entry.streams.begin(), entry.streams.end(),
                                                      *reader.stream) == entry.streams.end()) {
      const c10::impl::VirtualGuardImpl device(reader.stream->device_type());
      device.recordDataPtrOnStream(entry.lent.words.storage().data_ptr(), *reader.stream);
      entry.streams.push_back(*reader.stream);
    }
  }
  return entry.lent;
}

/// Locked.
void PlannedPatterns::pin(Entry& entry) {
  recent_.erase(entry.place);
  entry.is_pinned = true;
  ++counts_.pinned_entries;
  counts_.pinned_bytes += bytes_of(entry.lent.words);
}

/// Locked.
void PlannedPatterns::evict_to(int64_t entries, int64_t bytes) {
  while (!recent_.empty() && (static_cast<int64_t>(recent_.size()) > entries ||
                              counts_.bytes - counts_.pinned_bytes > bytes)) {
    const auto last = entries_.find(*recent_.back());
    counts_.bytes -= bytes_of(last->second.lent.words);
    ++counts_.evictions;
    recent_.pop_back();
    entries_.erase(last);
  }
}

PlannedPatternCounts PlannedPatterns::counts() {
  const std::lock_guard<std::mutex> lock(mutex_);
  PlannedPatternCounts counts = counts_;
  counts.entries = static_cast<int64_t>(recent_.size()) + counts.pinned_entries;
  return counts;
}

void PlannedPatterns::evict() {
  const std::lock_guard<std::mutex> lock(mutex_);
  evict_to(max_entries, max_bytes);
}

void PlannedPatterns::clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  evict_to(0, 0);
  counts_.hits = counts_.misses = counts_.evictions = 0;
}

PlannedPatterns& planned_patterns() { return of_process<PlannedPatterns>(); }

}  // namespace ops

PlannedPatternCounts planned_pattern_counts() { return ops::planned_patterns().counts(); }

void resize_planned_patterns(int64_t max_entries, int64_t max_bytes) {
  for (const auto& [name, bound] :
       {std::pair("max_entries", max_entries), std::pair("max_bytes", max_bytes)}) {
    if (bound < 0) {
      throw std::invalid_argument(std::string(name) + ": must be at least 0, got " +
                                  std::to_string(bound));
    }
  }
  ops::max_entries = max_entries;
  ops::max_bytes = max_bytes;
  ops::planned_patterns().evict();
}

void clear_planned_patterns() { ops::planned_patterns().clear(); }

}  // namespace dilated

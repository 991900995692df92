#include "ops/checked_patterns.h"

#include <algorithm>
#include <utility>

namespace dilated::ops {

bool CheckedPatterns::contains_or_insert(const at::Tensor& pattern, uint64_t fingerprint) {
  if (pattern.is_inference()) {
    return false;  // torch doesn't count writes to it
  }
  const at::Storage& storage = pattern.storage();
  const void* data = pattern.const_data_ptr();
  const int64_t words = pattern.numel();
  const auto version = static_cast<uint32_t>(pattern._version());
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto known = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& entry) {
    return entry.data == data && entry.words == words && entry.fingerprint == fingerprint &&
           entry.version == version &&
           entry.storage._unsafe_get_target() == storage.unsafeGetStorageImpl();
  });
  if (known != entries_.end()) {
    return true;
  }
  Entry entry{storage.getWeakStorageImpl(), data, words, version, fingerprint};
  if (entries_.size() < kCapacity) {
    entries_.push_back(std::move(entry));
  } else {
    entries_[oldest_] = std::move(entry);
    oldest_ = (oldest_ + 1) % kCapacity;
  }
  return false;
}

}  // namespace dilated::ops

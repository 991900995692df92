// A pattern's words as they are put together: parts at multiples of 16 bytes, then the header.
#pragma once

#include <dilated/pattern.h>

#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <vector>

namespace dilated::pattern {

/// Fills up to a multiple of 16 bytes.
inline void align(std::vector<int32_t>& words) {
  words.resize((words.size() + 3) / 4 * 4);
  if (words.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw std::invalid_argument("seq_len: must give a pattern below 2^31 words, got more");
  }
}

/// Appends the items and returns where they lie, until the words grow.
template <typename T>
std::span<T> extend(std::vector<int32_t>& words, const T* items, int64_t count) {
  static_assert(sizeof(T) % sizeof(int32_t) == 0);
  const size_t at = words.size();
  words.insert(words.end(), reinterpret_cast<const int32_t*>(items),
               reinterpret_cast<const int32_t*>(items + count));
  return {reinterpret_cast<T*>(words.data() + at), static_cast<size_t>(count)};
}

/// Appends the items at a multiple of 16 bytes and returns where they begin, in words.
template <typename T>
int32_t append(std::vector<int32_t>& words, const std::vector<T>& items) {
  const auto at = static_cast<int32_t>(words.size());
  extend(words, items.data(), static_cast<int64_t>(items.size()));
  align(words);
  return at;
}

/// Words with room for a header and nothing else.
inline std::vector<int32_t> begin_words() {
  return std::vector<int32_t>(sizeof(Header) / sizeof(int32_t));
}

/// Whether one table serves both directions. "In the same segment, on the same lattice" is
/// symmetric, so only grouped heads, or queries and keys at different positions, need two.
bool is_symmetric(const PatternSpec& spec);

bool asks_for(const PatternSpec& spec, Directions direction);

/// Writes the header of the specification, with these tables, and the checksum.
void seal(const PatternSpec& spec, const Table& forward, const Table& transposed,
          std::vector<int32_t>& words);

}  // namespace dilated::pattern

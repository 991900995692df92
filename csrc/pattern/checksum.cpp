// The checksum of a pattern's words, which shows that they are as plan() made them.
#include <dilated/pattern.h>

#include <cstring>

namespace dilated {
namespace {

constexpr int64_t kUnitWords = 4;

uint64_t sum_units(const int32_t* words, int64_t begin, int64_t end) {
  uint64_t sum = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    uint64_t pairs[2];
    std::memcpy(pairs, words + unit * kUnitWords, sizeof(pairs));
    sum += checksum_term(pairs[0], pairs[1], static_cast<uint64_t>(unit));
  }
  return sum;
}

}  // namespace

uint64_t checksum(const int32_t* words, int64_t size) {
  uint64_t pairs[2];
  std::memcpy(pairs, words + kChecksumUnit * kUnitWords, sizeof(pairs));
  return sum_units(words, 0, kChecksumUnit) + checksum_term(pairs[0], 0, kChecksumUnit) +
         sum_units(words, kChecksumUnit + 1, size / kUnitWords);
}

bool is_planned(const int32_t* words, int64_t size) {
  constexpr int64_t kHeaderWords = sizeof(Header) / sizeof(int32_t);
  if (size < kHeaderWords || size % kUnitWords != 0) {
    return false;
  }
  Header header;
  std::memcpy(&header, words, sizeof(header));
  return header.magic == kPatternMagic && header.words == size &&
         join(header.checksum) == checksum(words, size);
}

}  // namespace dilated

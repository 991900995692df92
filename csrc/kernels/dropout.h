// Which pairs dropout keeps: a counter-based hash, the same on every device and in forward and
// backward.
#pragma once

#include <dilated/pattern_layout.h>

#include <cstdint>

namespace dilated::kernels {

/// Mixes 64 bits (the finalizer of MurmurHash3 with Stafford's constants, variant 13).
DILATED_HOST_DEVICE inline uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

/// Mixes 32 bits (Wellons' lowbias32): what a kernel computes for every pair.
DILATED_HOST_DEVICE inline uint32_t mix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

inline constexpr uint64_t kDropoutStep = 0x9e3779b97f4a7c15ull;

/// Once per query row: its part of the hash. entry: of the batch, or of its list of sequences.
///
/// Entry and head are steps of the seed, so that a call for some entries and heads of a larger one
/// draws what that draws, with a seed that is some steps on (pattern/dropout.py).
DILATED_HOST_DEVICE inline uint32_t dropout_row_key(int64_t seed, int64_t entry, int64_t head,
                                                    int64_t query_position) {
  // Two steps of SplitMix64. The second adds to the first's result. If both mixed the same number
  // they would cancel, and mix64(0) is 0.
  const uint64_t place = (static_cast<uint64_t>(head) << 32) + static_cast<uint64_t>(entry);
  const uint64_t stream = mix64(static_cast<uint64_t>(seed) + kDropoutStep * (place + 1));
  return static_cast<uint32_t>(
      mix64(stream + kDropoutStep * (static_cast<uint64_t>(query_position) + 1)));
}

/// The pair is kept iff its hash is at least this.
DILATED_HOST_DEVICE inline uint32_t dropout_threshold(float probability) {
  return static_cast<uint32_t>(probability * 4294967296.0);
}

DILATED_HOST_DEVICE inline bool dropout_keeps(uint32_t row_key, int32_t key_position,
                                              uint32_t threshold) {
  return mix32(row_key ^ (static_cast<uint32_t>(key_position) * 0x9e3779b9u)) >= threshold;
}

}  // namespace dilated::kernels

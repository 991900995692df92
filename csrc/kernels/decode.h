// What the decode kernels are given, on every device: causal queries of a text's last positions,
// over rows that a cache keeps. Filled and checked by csrc/ops/decode.cpp; kernels trust it.
//
// Which rows a query meets follows from its position by arithmetic, so that positions may lie in
// device memory and nothing is planned:
//
//   branch w = 8, r = 2, offset 1, query at position 13    8 [9] 10 [11] 12 [13]
//
// Lattices nest where w divides the larger w, r the larger r, and the offsets agree. A row that
// several of a head's lattices hold is then met once, in the innermost, which its segment makes
// the nearest to the query, and its score gets the logarithm of their number added: the outer
// lattice adds the rows before the inner one's open segment.
#pragma once

#include <cstdint>

#include "kernels/attention.h"

namespace dilated::kernels {

inline constexpr int32_t kMostBranches = 16;

/// A branch's lattice, as one query head has it. A table [branches, heads] of them lies where the
/// tensors are.
struct Lattice {
  int64_t offset;  // -1: the head is not in the branch
  int64_t first;   // where the lattice's rows begin in a cache that forgets
  int64_t parent;  // the branch of the lattice that this one nests in, or -1
  int64_t kept;    // the cache keeps positions of the segment below this; the parent has the others
};

/// Of all branches. A cache that forgets has rows [batch, rows, head_dim], row `first` + j being
/// the j-th of a lattice in the open segment; an ordinary one [batch, seq_len, kv_heads, head_dim].
struct DecodeArgs {
  Dtype dtype;
  int64_t batch, queries, heads, kv_heads, head_dim;
  int64_t rows;  // of the cache, which nothing leaves, whatever lengths say
  int32_t branches;
  int64_t segment_lengths[kMostBranches], dilation_rates[kMostBranches];
  const Lattice* lattices;
  const int64_t* lengths;  // [batch]: positions of each text
  const int64_t* counts;  // [batch]: how many of `queries` are a text's, the first ones; or nullptr
};

/// Query i of a text has position lengths - counts + i. out [batch, queries, heads, head_dim] is of
/// the dtype, lse [batch, heads, queries] float32 (float64 for float64); every row is written, that
/// of a query in no branch or past the count with out = 0 and lse = -inf.
struct DecodeAttendArgs : DecodeArgs {
  double scale;
  bool forgets;
  Rows query, key, value;
  MutableRows out;
  void* lse;
};

/// key and value, `queries` positions after those of lengths, go into a cache that forgets: of each
/// lattice the rows of the segment that they end in. lengths then count them.
struct DecodeAppendArgs : DecodeArgs {
  int64_t max_seq_len;
  Rows key, value;
  MutableRows key_rows, value_rows;
  int64_t* lengths_after;  // the same memory as lengths
};

/// decode_append and then decode_attend of one position, in one: the position is that of lengths
/// before, which `new_key` and `new_value` have and `key` and `value` get.
struct DecodeStepArgs : DecodeAttendArgs {
  Rows new_key, new_value;  // no data: there is nothing to append
  MutableRows key_rows, value_rows;
  int64_t* lengths_after;
  int64_t max_seq_len;

  DILATED_HOST_DEVICE bool appends() const { return new_key.data != nullptr; }
};

/// How many of the call's positions are a text's: from none to all, whatever counts say.
DILATED_HOST_DEVICE inline int64_t count_of(const DecodeArgs& args, int64_t batch) {
  if (args.counts == nullptr) {
    return args.queries;
  }
  const int64_t count = args.counts[batch];
  return count < 0 ? 0 : count < args.queries ? count : args.queries;
}

/// 64-bit division takes a GPU four times as long.
struct Division {
  int64_t quotient, remainder;
};
DILATED_HOST_DEVICE inline Division divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) {
    const auto low = static_cast<uint32_t>(a), by = static_cast<uint32_t>(b);
    return {low / by, low % by};
  }
  return {a / b, a % b};
}

/// Tells multiples of a number without dividing: n is one iff n / odd, which modulo 2^32 is a
/// product, rotated by the number's twos, is at most the largest multiple's (Hacker's Delight,
/// 10-17).
struct Divisor {
  uint32_t inverse, twos, limit;

  DILATED_HOST_DEVICE bool divides(uint32_t n) const {
    const uint32_t product = n * inverse;
    return (product >> twos | product << ((32 - twos) & 31)) <= limit;
  }
};
DILATED_HOST_DEVICE inline Divisor make_divisor(uint32_t number) {
  uint32_t odd = number, twos = 0;
  for (; odd % 2 == 0; odd /= 2) {
    ++twos;
  }
  uint32_t inverse = odd;  // of 3 bits; each step doubles them
  for (int step = 0; step < 4; ++step) {
    inverse *= 2 - odd * inverse;
  }
  return {inverse, twos, 0xffffffffu / number};
}

/// A lattice's rows that one query meets there: row `first`, then every step-th, `count` of them.
/// The query is `distance` lattice points after the first of them.
struct LatticeRows {
  int64_t first, step, count, distance;
};

/// Of the query of a head at a position; no rows where the head's lattice does not hold it.
DILATED_HOST_DEVICE inline LatticeRows rows_met(const DecodeArgs& args, bool forgets,
                                                int32_t branch, const Lattice& lattice,
                                                int64_t position) {
  const int64_t rate = args.dilation_rates[branch];
  const int64_t phase = divide(position, args.segment_lengths[branch]).remainder;
  const Division place = divide(phase, rate);
  if (place.remainder != lattice.offset) {
    return {0, 0, 0, 0};
  }
  int64_t count = place.quotient + 1;
  if (lattice.parent >= 0) {  // those before the parent's open segment
    const int64_t inner = divide(position, args.segment_lengths[lattice.parent]).remainder;
    const int64_t end = phase - inner - lattice.offset;
    count = end > 0 ? divide(end + rate - 1, rate).quotient : 0;
  }
  const int64_t first = forgets ? lattice.first : position - phase + lattice.offset;
  const int64_t step = forgets ? 1 : rate;
  return {first, step, first + step * (count - 1) < args.rows ? count : 0, place.quotient};
}

/// Whether the head's lattice holds the position, in a segment that `last` ends: then its row in a
/// cache that forgets, else -1.
DILATED_HOST_DEVICE inline int64_t row_kept(const DecodeArgs& args, int32_t branch,
                                            const Lattice& lattice, int64_t position,
                                            int64_t last) {
  const Division segment = divide(position, args.segment_lengths[branch]);
  const Division place = divide(segment.remainder, args.dilation_rates[branch]);
  const bool is_kept = place.remainder == lattice.offset && segment.remainder < lattice.kept &&
                       segment.quotient == divide(last, args.segment_lengths[branch]).quotient;
  const int64_t row = lattice.first + place.quotient;
  return is_kept && row < args.rows ? row : -1;
}

}  // namespace dilated::kernels

// What the gather and scatter kernels are given, on every device. Filled and checked by
// csrc/ops/gather.cpp; kernels trust it.
#pragma once

#include <dilated/pattern_layout.h>

#include <cstdint>

#include "kernels/attention.h"

namespace dilated::kernels {

/// One branch's rows of a stretch of the sequence: row n of `rows` has position start + n. The
/// stretch is cut where a segment ends; a piece of length len has ceil(len / rate) slots, and the
/// pieces' slots follow each other in `packed`. Slot j of head h stands for the j-th position of
/// the piece with (p mod segment_length) mod rate == offset(h), if any.
struct GatherArgs {
  Dtype dtype;
  int64_t batch, length, heads, head_dim;  // length: rows of `rows`
  int64_t slots;                           // rows of `packed`
  int64_t start, segment_length, dilation_rate;
  const int64_t* offsets;  // [heads] where the tensors are, -1: none; nullptr: h mod dilation_rate
};

/// Offsets that travel to a GPU among a launch's arguments, which saves a copy.
inline constexpr int kInlineHeads = 256;
struct InlineOffsets {
  bool given;  // instead of GatherArgs::offsets
  int32_t values[kInlineHeads];
};

/// gather: packed <- rows, zeros where a slot has no position.
struct GatherForwardArgs : GatherArgs {
  Rows rows;
  MutableRows packed;
};

/// scatter: rows <- packed, or rows += packed; slots without a position are ignored.
struct ScatterArgs : GatherArgs {
  Rows packed;
  MutableRows rows;
  bool accumulate;
};

/// A piece of a stretch: where it begins and ends in the sequence, and its first slot.
struct Piece {
  int64_t begin, end, slot;
};

/// Piece 0 reaches from `start` to the end of its segment; every later one is a segment, the last
/// of which may be cut.
DILATED_HOST_DEVICE inline Piece piece_at(const GatherArgs& args, int64_t piece) {
  const int64_t w = args.segment_length, r = args.dilation_rate;
  const int64_t stop = args.start + args.length;
  const int64_t first_end = (args.start / w + 1) * w;
  if (piece == 0) {
    return {args.start, first_end < stop ? first_end : stop, 0};
  }
  const int64_t begin = first_end + (piece - 1) * w;
  const int64_t slot = (first_end - args.start + r - 1) / r + (piece - 1) * ((w + r - 1) / r);
  return {begin, begin + w < stop ? begin + w : stop, slot};
}

/// The position that slot `slot` (counted over all pieces) of a head with this offset stands for,
/// or -1.
DILATED_HOST_DEVICE inline int64_t slot_position(const GatherArgs& args, int64_t offset,
                                                 int64_t slot) {
  const int64_t w = args.segment_length, r = args.dilation_rate;
  const int64_t first_slots = (piece_at(args, 0).end - args.start + r - 1) / r;
  const int64_t full_slots = (w + r - 1) / r;
  const Piece piece =
      piece_at(args, slot < first_slots ? 0 : 1 + (slot - first_slots) / full_slots);
  if (offset < 0) {
    return -1;
  }
  // The lattice point at or after the piece's beginning, which lies `phase` into its segment.
  const int64_t phase = piece.begin % w;
  const int64_t ahead = ((offset - phase) % r + r) % r;
  const int64_t position = piece.begin + ahead + (slot - piece.slot) * r;
  return position < piece.end ? position : -1;
}

DILATED_HOST_DEVICE inline int64_t head_offset(const GatherArgs& args, int64_t head) {
  return args.offsets != nullptr ? args.offsets[head] : head % args.dilation_rate;
}

}  // namespace dilated::kernels

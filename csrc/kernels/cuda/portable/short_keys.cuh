// The keys of a tile of 16 rows: those that all its rows may see, then those that only the rows of
// one half may, where causality or a window cuts the others off. Either part is padded to whole
// blocks, ShortKeys::kKeys keys by half the rows.
#pragma once

#include <dilated/pattern.h>

#include "kernels/cuda/primitives/lists.cuh"

namespace dilated::kernels::cuda::portable {

/// Which blocks of a key tile are computed: bit 2 * m + n for keys 16 * m .. 16 * m + 15 and rows 8
/// * n .. 8 * n + 7.
using Blocks = uint32_t;

struct ShortKeys {
  static constexpr int32_t kRows = kRowBlock, kKeys = kColumnBlock;

  int32_t shared, further;           // keys of the parts
  Blocks shared_rows, further_rows;  // the halves that they meet, a bit each
  ColumnCursor further_cursor;       // warp 0's

  __device__ int32_t count() const { return shared + further; }

  /// Of the kTileKeys keys from `first` on.
  template <int kTileKeys>
  __device__ Blocks blocks_at(int32_t first) const {
    Blocks blocks = 0;
#pragma unroll
    for (int m = 0; m < kTileKeys / kKeys; ++m) {
      const int32_t key = first + m * kKeys;
      const Blocks further_or_none = key < count() ? further_rows : 0;
      blocks |= (key < shared ? shared_rows : further_or_none) << (2 * m);
    }
    return blocks;
  }
};

/// One warp, which is the block: splits the keys that the rows see together. Leaves the window of
/// those that they share, and the padded number of all.
template <int kRows>
__device__ inline void split_keys(const TableView& table, const WorkItem& work,
                                  const AttentionArgs& args, const RowTileList<kRows>& rows,
                                  KeyList& keys, ShortKeys& parts) {
  const auto round_up = [](int32_t count) {
    return (count + ShortKeys::kKeys - 1) / ShortKeys::kKeys * ShortKeys::kKeys;
  };
  const bool has_both = rows.count > ShortKeys::kRows;
  Window& some = keys.windows.some;
  Window further = some;
  int32_t shared = keys.columns;
  bool is_high = false;
  if (has_both && has_windows(work, args)) {
    const int row = threadIdx.x % kRows;
    const int32_t last = window_of(rows, row, args.is_causal, /*over_keys=*/false).last;
    const bool is_low = row < ShortKeys::kRows;
    const int32_t low = __reduce_max_sync(kAllLanes, is_low ? last : INT_MIN);
    const int32_t high = __reduce_max_sync(kAllLanes, is_low ? INT_MIN : last);
    if (low != high) {
      is_high = low < high;
      some.last = min(low, high);
      further.first = max(some.first, some.last + 1);
      shared = count_columns(table, work, some);
    }
  }
  parts = {round_up(shared), round_up(keys.columns - shared), has_both ? 3u : 1u, is_high ? 2u : 1u,
           cursor_of(table, work, further)};
  keys.columns = parts.count();
}

/// One warp: lists the key tile that begins with key `first`.
template <int kKeys>
__device__ inline void read_short_keys(ColumnCursor& cursor, ShortKeys& parts, int32_t first,
                                       const Window& all, KeyTile<kKeys>& keys) {
  static_assert(kKeys == 32, "a lane lists one");
  const int32_t own = first + static_cast<int32_t>(threadIdx.x % 32);
  Column columns[1];
  bool one_run = true;
#pragma unroll 1
  for (int32_t part = 0; part < 2; ++part) {
    const int32_t begin = part == 0 ? 0 : parts.shared;
    const int32_t end = part == 0 ? parts.shared : parts.count();
    if (first < end && first + kKeys > begin) {
      Column read[1];
      ColumnCursor& from = part == 0 ? cursor : parts.further_cursor;
      one_run = from.read(first - begin, read) && one_run && first >= begin;
      columns[0] = own >= begin ? read[0] : columns[0];
    }
  }
  list_columns(columns, one_run, all, keys);
}

}  // namespace dilated::kernels::cuda::portable

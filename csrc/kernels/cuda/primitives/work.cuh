// Which tile, head and batch entry a block works on.
//
// Items count through the tiles first, so that blocks that run together read the same keys; then
// through the batch and the heads of a class. Classes with fewer heads than the largest leave items
// empty. The host does not know how many tiles there are: it launches a guess of blocks, and block
// b takes items b, b + blocks, ...
#pragma once

#include <dilated/pattern_layout.h>

#include <cstdint>

namespace dilated::kernels::cuda {

struct WorkItem {
  Tile tile;
  Group group;
  int32_t head;  // KV head when the table is transposed
  int32_t batch;

  /// Which sequence it is, for dropout: where the pattern is of several, the batch is one entry.
  __device__ int32_t entry() const { return batch + tile.sequence; }
};

__device__ inline int64_t count_work(const TableView& table, int64_t batch) {
  return static_cast<int64_t>(table.table->tiles) * table.table->max_class_heads * batch;
}

/// item = slot * tiles + tile, for a slot below 2^31: two approximations and a correction, all
/// without the subroutine (and the registers that it costs the caller) of a 64-bit division.
__device__ inline void split_item(int64_t item, int32_t tiles, int32_t& slot, int32_t& tile) {
  const float reciprocal = __fdividef(1.0f, static_cast<float>(tiles));
  int64_t quotient = 0, rest = item;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    quotient += static_cast<int64_t>(static_cast<float>(rest) * reciprocal);
    rest = item - quotient * tiles;
  }
  while (rest < 0) {
    --quotient;
    rest += tiles;
  }
  while (rest >= tiles) {
    ++quotient;
    rest -= tiles;
  }
  slot = static_cast<int32_t>(quotient);
  tile = static_cast<int32_t>(rest);
}

/// Leaves the tile without its first rows.
__device__ inline void skip_rows(Tile& tile, int32_t rows) {
  tile.first_row += rows;
  tile.rows -= rows;
  tile.first_window += tile.first_window < 0 ? 0 : rows;
}

/// For a block that takes `rows` of a group at once, where the pattern's tiles may have fewer: the
/// tile with as many, or false where they come with an earlier one.
__device__ inline bool widen_tile(WorkItem& work, int32_t rows) {
  Tile& tile = work.tile;
  if (tile.first_row % rows != 0) {
    return false;
  }
  tile.rows = min(work.group.rows - tile.first_row, max(tile.rows, rows));
  return true;
}

/// False if the item is empty. Every thread of the block gets the same.
__device__ inline bool find_work(const TableView& table, int64_t item, int64_t batch,
                                 WorkItem& work) {
  int32_t slot, index;
  split_item(item, table.table->tiles, slot, index);
  const auto load = [](auto& item, const auto* from) {
    static_assert(sizeof(item) == 2 * sizeof(int4));
    const int4 low = __ldg(reinterpret_cast<const int4*>(from));
    const int4 high = __ldg(reinterpret_cast<const int4*>(from) + 1);
    item = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  };
  load(work.tile, table.tiles() + index);
  load(work.group, table.groups() + work.tile.group);
  const int32_t rank = slot / static_cast<int32_t>(batch);
  work.batch = slot - rank * static_cast<int32_t>(batch);
  const int32_t* heads = table.class_begin() + work.group.head_class;
  const int32_t begin = __ldg(heads);
  if (rank >= __ldg(heads + 1) - begin) {
    return false;
  }
  work.head = __ldg(table.class_heads() + begin + rank);
  return true;
}

}  // namespace dilated::kernels::cuda

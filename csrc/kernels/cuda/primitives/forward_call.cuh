// What the forward kernels, 16-bit and float32, are launched with, and how both begin a tile.
#pragma once

#include <climits>

#include "kernels/attention.h"
#include "kernels/cuda/primitives/columns.cuh"
#include "kernels/cuda/primitives/launch.cuh"
#include "kernels/cuda/primitives/row_tile.cuh"
#include "kernels/cuda/primitives/work.cuh"
#include "kernels/dropout.h"

namespace dilated::kernels::cuda {

struct ForwardCall {
  ForwardArgs args;
  int32_t heads_per_key_head;
  float scale_log2;  // scale * log2(e), for exponentials of scores that are not rounded as logits
  // See RowSource::is_aligned.
  bool query_aligned, key_aligned, value_aligned, out_aligned, running_aligned;
};

/// On the host.
inline ForwardCall prepare_forward(const ForwardArgs& args) {
  const int64_t bytes = args.dtype == Dtype::kFloat32 ? 4 : 2;
  const auto aligned = [&](const Rows& rows) { return is_aligned(rows, args.head_dim, bytes); };
  return {args,
          static_cast<int32_t>(args.heads / args.kv_heads),
          args.scale * kLog2E,
          aligned(args.query),
          aligned(args.key),
          aligned(args.value),
          is_aligned(args.out, args.head_dim, args.is_partial ? 4 : bytes),
          is_aligned(args.running_out, args.head_dim, 4)};
}

/// A tile of keys as listed; past the end of the list their weight is 0.
template <int kKeys>
struct alignas(16) KeyTile {
  int32_t position[kKeys];
  float bias[kKeys];  // log of the multiplicity; -inf past the end of the list
  float plain_bias_log2;
  int32_t is_plain;   // every row sees all keys, and with the same multiplicity, of this base-2
                      // logarithm throughout
  int32_t is_causal;  // some key may lie after some row
  int32_t reserved;
};

/// The rows of a tile.
template <int kRows>
struct alignas(16) QueryTile {
  int32_t position[kRows];
  uint32_t dropout_key[kRows];
};

template <typename Source>
__device__ inline const char* row_origin(const Source& rows, const WorkItem& work, int32_t head,
                                         int32_t begin, int32_t element_bytes) {
  const int64_t elements =
      work.batch * rows.strides.batch + head * rows.strides.head - begin * rows.strides.row;
  return static_cast<const char*>(rows.data) + elements * element_bytes;
}

__device__ inline RowSource row_source(const char* origin, const Rows& rows, int64_t head_dim,
                                       bool is_aligned) {
  return {origin, static_cast<uint32_t>(rows.strides.row * 2), static_cast<int32_t>(head_dim),
          is_aligned};
}

/// Fills the tile with rows first_row.. of the group, 32 a warp; past the last row that row is
/// repeated.
template <int kRows>
__device__ inline void read_rows(const TableView& table, const WorkItem& work,
                                 const ForwardArgs& args, QueryTile<kRows>& rows) {
  const int lane = threadIdx.x % 32;
  const int64_t seed = args.dropout.probability > 0 ? __ldg(args.dropout.seed) : 0;
  for (int first = threadIdx.x / 32 * 32; first < kRows; first += blockDim.x) {
    ColumnCursor cursor(table.runs() + work.group.row_runs, work.group.row_run_count,
                        work.tile.origin);
    Column row[1];
    cursor.read(work.tile.first_row + first, row);
    rows.position[first + lane] = row[0].position;
    if (args.dropout.probability > 0) {
      rows.dropout_key[first + lane] =
          dropout_row_key(seed, work.batch, work.head, row[0].position);
    }
  }
}

/// Lowest and highest position of the tile's rows. All lanes of the warp get both.
template <int kRows>
__device__ inline void find_extent(const QueryTile<kRows>& rows, int32_t& lowest,
                                   int32_t& highest) {
  lowest = INT_MAX;
  highest = INT_MIN;
  for (int row = threadIdx.x % 32; row < kRows; row += 32) {
    lowest = min(lowest, rows.position[row]);
    highest = max(highest, rows.position[row]);
  }
  lowest = __reduce_min_sync(kAllLanes, lowest);
  highest = __reduce_max_sync(kAllLanes, highest);
}

/// The keys that a tile walks. If causal, they end at the tile's last row, and those up to
/// `lowest`, its first, are seen by every row.
struct KeyList {
  const Run* runs;
  int32_t run_count, origin, columns;
  int32_t lowest, highest;  // positions of the rows, as far as the keys depend on them

  __device__ ColumnCursor cursor() const {
    return ColumnCursor(runs, run_count, origin, INT_MIN, highest);
  }
};

/// The whole block: reads the rows and finds their keys.
template <int kRows>
__device__ inline KeyList begin_rows(const TableView& table, const WorkItem& work,
                                     const ForwardArgs& args, QueryTile<kRows>& rows) {
  read_rows(table, work, args, rows);
  __syncthreads();
  KeyList keys{table.runs() + work.group.column_runs,
               work.group.column_run_count,
               work.tile.origin,
               work.group.columns,
               INT_MAX,
               INT_MAX};
  if (args.is_causal) {
    find_extent(rows, keys.lowest, keys.highest);
    keys.columns = count_columns(keys.runs, keys.run_count, keys.origin, INT_MIN, keys.highest);
  }
  return keys;
}

/// One warp: the next key tile of the list. Keys after last_plain_position lie after some row.
template <int kKeys>
__device__ inline void read_keys(ColumnCursor& cursor, int32_t first, int32_t last_plain_position,
                                 KeyTile<kKeys>& keys) {
  constexpr int kPerLane = kKeys / 32;
  const int lane = threadIdx.x % 32;
  Column columns[kPerLane];
  const bool one_run = cursor.read(first, columns);
  const uint32_t tag = __shfl_sync(kAllLanes, columns[0].tag, 0);
  bool causal = false, differs = false;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    keys.position[i * 32 + lane] = columns[i].position;
    keys.bias[i * 32 + lane] = columns[i].log_multiplicity();
    causal = causal || columns[i].position > last_plain_position;
    differs = differs || columns[i].tag != tag;
  }
  causal = __any_sync(kAllLanes, causal);
  differs = !one_run && __any_sync(kAllLanes, differs);
  if (lane == 0) {
    keys.plain_bias_log2 = columns[0].log2_multiplicity();
    keys.is_plain = !differs && !causal;
    keys.is_causal = causal;
  }
}

}  // namespace dilated::kernels::cuda

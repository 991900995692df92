// What the 16-bit backward kernel is launched with, its tile of queries, and how one warp fills it.
#pragma once

#include "kernels/attention.h"
#include "kernels/cuda/portable/backward_sums.cuh"
#include "kernels/cuda/primitives/async_copy.cuh"
#include "kernels/cuda/primitives/lists.cuh"
#include "kernels/cuda/primitives/mma.cuh"
#include "kernels/cuda/primitives/row_tile.cuh"
#include "kernels/cuda/primitives/score.cuh"
#include "kernels/cuda/primitives/work.cuh"
#include "kernels/dropout.h"

namespace dilated::kernels::cuda::portable {

struct BackwardCall {
  BackwardArgs args;
  unsigned long long* next;  // the first item that no block has taken; zero at launch
  QuerySums grad_query;      // data is nullptr where another kernel computes grad_query
  int32_t stages;  // 2: the next tile is copied while the block computes; 1: where shared memory is
                   // short
};

/// Query rows of a column tile, in the order of the list.
template <int kQueries>
struct alignas(16) QueryColumns {
  int64_t query_offset[kQueries], grad_out_offset[kQueries];  // bytes from the tensor's start
  int64_t row[kQueries];  // in lse, delta and the sums of grad_query
  int32_t position[kQueries];
  float bias[kQueries];  // log of the multiplicity; -inf past the end of the list
  float lse[kQueries];   // as given, then as softmax_weight() takes it
  float delta[kQueries];
  uint32_t dropout_key[kQueries];
  int32_t is_masked;  // some key row does not see some query, or does not exist
  int32_t reserved[3];
};

/// What the tiles of a work item have in common; in shared memory.
struct BackwardItem {
  WorkItem work;
  int32_t columns;  // queries of the list
  Windows windows;  // of the keys
};

/// One warp: lists the next tile's queries and starts copying their statistics. Commit, and wait,
/// before finish_columns.
template <int kQueries>
__device__ inline void read_columns(const BackwardCall& call, const BackwardItem& item,
                                    int32_t first, bool is_masked, ColumnCursor& cursor,
                                    QueryColumns<kQueries>& columns) {
  constexpr int kPerLane = kQueries / 32;
  const BackwardArgs& args = call.args;
  const int lane = threadIdx.x % 32;
  const int64_t batch = item.work.batch;
  const int32_t first_head = item.work.head * static_cast<int32_t>(args.heads / args.kv_heads);
  Column list[kPerLane];
  cursor.read(first, list);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int at = i * 32 + lane;
    const int32_t head = first_head + static_cast<int32_t>(list[i].head());
    const int32_t query = list[i].place;
    const int64_t row = (batch * args.heads + head) * args.queries + query;
    const auto offset = [&](const Strides& strides) {
      return (batch * strides.batch + head * strides.head + query * strides.row) * 2;
    };
    columns.query_offset[at] = offset(args.query.strides);
    columns.grad_out_offset[at] = offset(args.grad_out.strides);
    columns.row[at] = row;
    columns.position[at] = list[i].position;
    columns.bias[at] = list[i].log_multiplicity();
    copy_4_async(shared_address(&columns.lse[at]), static_cast<const float*>(args.lse) + row);
    copy_4_async(shared_address(&columns.delta[at]), static_cast<const float*>(args.delta) + row);
    if (args.dropout.probability > 0) {
      columns.dropout_key[at] =
          dropout_row_key(__ldg(args.dropout.seed), item.work.entry(), head, list[i].position);
    }
    is_masked = is_masked || !sees(item.windows.all, list[i].position);
  }
  is_masked = __any_sync(kAllLanes, is_masked);
  if (lane == 0) {
    columns.is_masked = is_masked;
  }
}

/// One warp, once the copies have arrived: what the exponents need.
template <int kQueries>
__device__ inline void finish_columns(QueryColumns<kQueries>& columns) {
#pragma unroll
  for (int at = threadIdx.x % 32; at < kQueries; at += 32) {
    columns.lse[at] = weight_lse(columns.lse[at]);
  }
}

}  // namespace dilated::kernels::cuda::portable

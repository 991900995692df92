// Rows of new positions into a cache that forgets: a warp for each position, branch and KV head.
#include <algorithm>
#include <limits>

#include "kernels/cuda/decode/decode.h"

namespace dilated::kernels::cuda::decode {
namespace {

constexpr int kThreads = 256;

/// Vector: what a lane copies at a time.
template <typename Vector>
__device__ void copy_row(const Rows& from, int64_t from_offset, const MutableRows& to,
                         int64_t to_offset, int64_t bytes) {
  const auto* source = reinterpret_cast<const Vector*>(static_cast<const char*>(from.data) +
                                                       from_offset * from.element_bytes);
  auto* target =
      reinterpret_cast<Vector*>(static_cast<char*>(to.data) + to_offset * to.element_bytes);
  for (int64_t i = threadIdx.x % 32; i < bytes / static_cast<int64_t>(sizeof(Vector)); i += 32) {
    target[i] = source[i];
  }
}

/// The row of the first of a KV head's query heads whose lattice holds the position, or -1; the
/// others that hold it have the same lattice.
__device__ int64_t find_row(const DecodeAppendArgs& args, int32_t branch, int64_t kv_head,
                            int64_t position, int64_t last) {
  const int64_t group = args.heads / args.kv_heads;
  for (int64_t first = 0; first < group; first += 32) {
    const int64_t head = first + threadIdx.x % 32;
    int64_t row = -1;
    if (head < group) {
      const Lattice lattice = args.lattices[branch * args.heads + kv_head * group + head];
      row = row_kept(args, branch, lattice, position, last);
    }
    if (const unsigned found = __ballot_sync(0xffffffffu, row >= 0); found != 0) {
      return __shfl_sync(0xffffffffu, row, __ffs(static_cast<int>(found)) - 1);
    }
  }
  return -1;
}

/// blocks: of a text. One block advances the text's length itself.
template <typename Vector>
__global__ void __launch_bounds__(kThreads)
    append_kernel(const __grid_constant__ DecodeAppendArgs args, int blocks) {
  const int64_t batch = blockIdx.x / blocks, part = blockIdx.x % blocks;
  const int64_t length = args.lengths[batch], count = count_of(args, batch);
  if (length + count > args.max_seq_len) {
    __trap();
  }
  const int64_t pairs = args.branches * args.kv_heads, warps = kThreads / 32;
  for (int64_t i = part * warps + threadIdx.x / 32; i < count * pairs; i += blocks * warps) {
    const int64_t index = i / pairs;
    const auto pair = static_cast<int32_t>(i - index * pairs);
    const int32_t branch = pair / static_cast<int32_t>(args.kv_heads);
    const int64_t kv_head = pair - branch * args.kv_heads;
    const int64_t row = find_row(args, branch, kv_head, length + index, length + count - 1);
    if (row >= 0) {
      const int64_t bytes = args.head_dim * args.key.element_bytes;
      copy_row<Vector>(args.key, args.key.strides.offset(batch, index, kv_head), args.key_rows,
                       args.key_rows.strides.offset(batch, row, 0), bytes);
      copy_row<Vector>(args.value, args.value.strides.offset(batch, index, kv_head),
                       args.value_rows, args.value_rows.strides.offset(batch, row, 0), bytes);
    }
  }
  __syncthreads();
  if (blocks == 1 && threadIdx.x == 0) {
    args.lengths_after[batch] = length + count;
  }
}

__global__ void advance_kernel(const __grid_constant__ DecodeAppendArgs args) {
  const int64_t batch = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (batch < args.batch) {
    args.lengths_after[batch] = args.lengths[batch] + count_of(args, batch);
  }
}

template <typename Vector>
cudaError_t launch(const DecodeAppendArgs& args, cudaStream_t stream) {
  constexpr int64_t kPositions = 8, kMostBlocks = 1024;  // of a block that is not alone; of a text
  const int64_t blocks =
      std::clamp<int64_t>((args.queries + kPositions - 1) / kPositions, 1, kMostBlocks);
  if (args.batch * blocks > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidValue;
  }
  append_kernel<Vector><<<static_cast<unsigned>(args.batch * blocks), kThreads, 0, stream>>>(
      args, static_cast<int>(blocks));
  if (blocks > 1) {
    advance_kernel<<<static_cast<unsigned>((args.batch + kThreads - 1) / kThreads), kThreads, 0,
                     stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t append(const DecodeAppendArgs& args, cudaStream_t stream) {
  if (args.batch == 0 || args.queries == 0) {
    return cudaSuccess;
  }
  if (args.key.is_aligned && args.value.is_aligned && args.key_rows.is_aligned &&
      args.value_rows.is_aligned) {
    return launch<int4>(args, stream);
  }
  return args.key.element_bytes == 2 ? launch<uint16_t>(args, stream)
                                     : launch<uint32_t>(args, stream);
}

}  // namespace dilated::kernels::cuda::decode

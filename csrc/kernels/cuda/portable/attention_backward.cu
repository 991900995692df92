// Launches the backward pass: from run-time dtype, head_dim and device to kernels.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/portable/attention_backward.cuh"
#include "kernels/cuda/portable/backward_query.cuh"
#include "kernels/cuda/portable/backward_scalar.cuh"
#include "kernels/cuda/primitives/launch.cuh"

namespace dilated::kernels::cuda {
namespace {

constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();

struct Device {
  int multiprocessors = 0;
  size_t shared_bytes = 0;  // that a block can have
};

/// One call of attention_backward.
struct Launch {
  const BackwardArgs& args;
  float* sums;  // of grad_query; null: it is written by a kernel of its own
  unsigned long long* counter;
  Device device;
  cudaStream_t stream;
};

/// The current one, of whose shared memory a block may have `limit` bytes at most.
cudaError_t find_device(size_t limit, Device& device) {
  int index = 0, shared_bytes = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  device.shared_bytes = std::min(static_cast<size_t>(shared_bytes), limit);
  return error;
}

QuerySums query_sums(float* sums, int64_t head_dim) {
  return {sums, static_cast<int32_t>(query_sums_width(head_dim))};
}

/// Shared memory of a block of kKeys keys with one stage.
template <typename Element, int kWidth, int kKeys>
constexpr size_t least_bytes() {
  using Memory = BackwardMemory<BackwardShape<Element, kWidth, kKeys>>;
  return sizeof(Memory) + Memory::kStageBytes;
}

/// Two where they fit. Shape::kBlocks blocks are to share a multiprocessor, if they can with one
/// stage; it has 1 KiB more than its largest block, and each block takes so much.
template <typename Shape>
int32_t count_stages(size_t limit) {
  using Memory = BackwardMemory<Shape>;
  constexpr size_t kReserved = 1024;
  const auto have_room = [&](size_t stages, size_t blocks) {
    return blocks * (sizeof(Memory) + stages * Memory::kStageBytes + kReserved) <=
           limit + kReserved;
  };
  const size_t blocks = have_room(1, Shape::kBlocks) ? Shape::kBlocks : 1;
  return have_room(2, blocks) ? 2 : 1;
}

/// Blocks of kKeys keys with as many stages as the device has memory for; false if not even one
/// fits.
template <typename Element, int kWidth, int kKeys>
bool launch_keys(const Launch& launch, cudaError_t& error) {
  using Shape = BackwardShape<Element, kWidth, kKeys>;
  using Memory = BackwardMemory<Shape>;
  const size_t limit = launch.device.shared_bytes;
  if (least_bytes<Element, kWidth, kKeys>() > limit) {
    return false;
  }
  const int32_t stages = count_stages<Shape>(limit);
  const size_t bytes = sizeof(Memory) + static_cast<size_t>(stages) * Memory::kStageBytes;
  const BackwardArgs& args = launch.args;
  const auto aligned = [&](const auto& rows) { return is_aligned(rows, args.head_dim, 2); };
  const BackwardCall call{args,
                          launch.counter,
                          query_sums(launch.sums, args.head_dim),
                          stages,
                          aligned(args.query),
                          aligned(args.key),
                          aligned(args.value),
                          aligned(args.grad_out),
                          aligned(args.grad_key),
                          aligned(args.grad_value)};
  const int64_t blocks =
      std::min(count_blocks(args.keys, args.kv_heads, args.batch),
               static_cast<int64_t>(launch.device.multiprocessors) * Shape::kBlocks);
  error = launch_kernel<attention_backward_kernel<Element, kWidth, kKeys>>(
      call, blocks, Shape::kThreads, bytes, launch.stream);
  return true;
}

template <typename Element, int kWidth>
cudaError_t launch_queries(const Launch& launch) {
  using Shape = BackwardQueryShape<Element, kWidth>;
  static_assert(sizeof(BackwardQueryMemory<Shape>) <=
                (kWidth > 128 ? least_bytes<Element, 256, 64>() : kSharedBytes));
  const BackwardArgs& args = launch.args;
  const auto aligned = [&](const auto& rows) { return is_aligned(rows, args.head_dim, 2); };
  const BackwardQueryCall call{args,
                               aligned(args.query),
                               aligned(args.key),
                               aligned(args.value),
                               aligned(args.grad_out),
                               aligned(args.grad_query)};
  return launch_kernel<backward_query_kernel<Element, kWidth>>(
      call, count_blocks(args.queries, args.heads, args.batch), Shape::kThreads,
      sizeof(BackwardQueryMemory<Shape>), launch.stream);
}

template <typename Element>
cudaError_t round_sums(const RoundedSums& rounded, const QuerySums& sums, cudaStream_t stream) {
  const int64_t rows = rounded.batch * rounded.heads * rounded.queries;
  if (rows == 0) {
    return cudaSuccess;
  }
  constexpr int kThreads = 256;
  const int64_t blocks = (rows * (sums.width / 16) + kThreads - 1) / kThreads;
  if (blocks > kMaxBlocks) {
    return cudaErrorInvalidValue;
  }
  round_sums_kernel<Element><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      sums, rounded.grad_query, rounded.heads, rounded.queries, rows,
      static_cast<int32_t>(rounded.head_dim), rounded.scale,
      is_aligned(rounded.grad_query, rounded.head_dim, static_cast<int64_t>(sizeof(Element))));
  return cudaGetLastError();
}

template <typename Element, int kWidth>
cudaError_t launch_scalar(const Launch& launch) {
  using Shape = ScalarShape<kWidth>;
  static_assert(sizeof(ScalarMemory<kWidth>) <= kSharedBytes);
  const BackwardArgs& args = launch.args;
  const cudaError_t error = launch_kernel<backward_scalar_kernel<Element, kWidth, true>>(
      args, count_blocks(args.keys, args.kv_heads, args.batch), Shape::kThreads,
      sizeof(ScalarMemory<kWidth>), launch.stream);
  if (error != cudaSuccess) {
    return error;
  }
  return launch_kernel<backward_scalar_kernel<Element, kWidth, false>>(
      args, count_blocks(args.queries, args.heads, args.batch), Shape::kThreads,
      sizeof(ScalarMemory<kWidth>), launch.stream);
}

/// The shapes to try, largest first. The last fits every device, but for the widest, which
/// launch_scalar stands in for.
template <typename Element, int kWidth, int kKeys, int... kFewerKeys>
cudaError_t launch_tensor_cores(const Launch& launch) {
  static_assert(sizeof...(kFewerKeys) > 0 || kWidth > 128 ||
                least_bytes<Element, kWidth, kKeys>() <= kSharedBytes);
  cudaError_t error = cudaSuccess;
  if (!launch_keys<Element, kWidth, kKeys>(launch, error)) {
    if constexpr (sizeof...(kFewerKeys) > 0) {
      return launch_tensor_cores<Element, kWidth, kFewerKeys...>(launch);
    } else if constexpr (kWidth > 128) {
      return launch.sums == nullptr ? launch_scalar<Element, kWidth>(launch)
                                    : cudaErrorInvalidConfiguration;
    } else {
      return cudaErrorInvalidConfiguration;
    }
  }
  const bool is_done = launch.sums != nullptr || launch.args.queries == 0;
  return error != cudaSuccess || is_done ? error : launch_queries<Element, kWidth>(launch);
}

template <typename Element>
cudaError_t choose_width(const Launch& launch) {
  switch ((launch.args.head_dim + 15) / 16) {
    case 1:
    case 2:
      return launch_tensor_cores<Element, 32, 128>(launch);
    case 3:
      return launch_tensor_cores<Element, 48, 128>(launch);
    case 4:
      return launch_tensor_cores<Element, 64, 128>(launch);
    case 5:
    case 6:
      return launch_tensor_cores<Element, 96, 128, 64>(launch);
    case 7:
    case 8:
      return launch_tensor_cores<Element, 128, 128, 64>(launch);
    default:
      return launch_tensor_cores<Element, 256, 64>(launch);
  }
}

cudaError_t choose_float_width(const Launch& launch) {
  switch ((launch.args.head_dim + 31) / 32) {
    case 1:
      return launch_scalar<float, 32>(launch);
    case 2:
      return launch_scalar<float, 64>(launch);
    case 3:
    case 4:
      return launch_scalar<float, 128>(launch);
    default:
      return launch_scalar<float, 256>(launch);
  }
}

}  // namespace

cudaError_t backward_adds_up(Dtype dtype, int64_t head_dim, bool deterministic, size_t shared_bytes,
                             bool& adds_up) {
  Device device;
  const cudaError_t error = find_device(shared_bytes, device);
  // Where the widest block has no room, launch_scalar takes its place; both 16-bit types need the
  // same.
  const bool has_room = head_dim <= 128 || least_bytes<__half, 256, 64>() <= device.shared_bytes;
  adds_up = dtype != Dtype::kFloat32 && !deterministic && has_room;
  return error;
}

cudaError_t attention_backward(const BackwardArgs& args, float* sums, unsigned long long* counter,
                               size_t shared_bytes, cudaStream_t stream) {
  if (args.batch == 0 || (args.queries == 0 && args.keys == 0)) {
    return cudaSuccess;
  }
  Launch launch{args, sums, counter, {}, stream};
  const cudaError_t error = find_device(shared_bytes, launch.device);
  if (error != cudaSuccess) {
    return error;
  }
  switch (args.dtype) {
    case Dtype::kFloat16:
      return choose_width<__half>(launch);
    case Dtype::kBFloat16:
      return choose_width<__nv_bfloat16>(launch);
    case Dtype::kFloat32:
      return choose_float_width(launch);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t round_query_sums(const RoundedSums& rounded, float* sums, cudaStream_t stream) {
  const QuerySums rows = query_sums(sums, rounded.head_dim);
  switch (rounded.dtype) {
    case Dtype::kFloat16:
      return round_sums<__half>(rounded, rows, stream);
    case Dtype::kBFloat16:
      return round_sums<__nv_bfloat16>(rounded, rows, stream);
    case Dtype::kFloat32:
      return round_sums<float>(rounded, rows, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace dilated::kernels::cuda

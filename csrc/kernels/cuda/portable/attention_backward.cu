// Launches the backward pass: from run-time dtype, head_dim and device to kernels.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/portable/attention_backward.cuh"
#include "kernels/cuda/portable/backward_query.cuh"
#include "kernels/cuda/portable/backward_scalar.cuh"

namespace dilated::kernels::cuda {
namespace {

constexpr int64_t kRowTile = 64;       // of the pattern
constexpr size_t kCounterBytes = 256;  // BackwardCall::next, in front of the sums
constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();

struct Device {
  int multiprocessors = 0, shared_bytes = 0;  // shared memory that a block can have
};

/// One call of attention_backward.
struct Launch {
  const BackwardArgs& args;
  void* workspace;
  bool deterministic;
  Device device;
  cudaStream_t stream;
};

cudaError_t find_device(Device& device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   index);
  }
  return error;
}

template <typename Kernel, typename Call>
cudaError_t launch_kernel(Kernel kernel, const Call& call, int64_t blocks, int threads,
                          size_t shared_bytes, cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error != cudaSuccess) {
    return error;
  }
  kernel<<<static_cast<unsigned>(std::min(blocks, kMaxBlocks)), threads, shared_bytes, stream>>>(
      call);
  return cudaGetLastError();
}

/// One block for each tile if tiles are full; where there are more tiles than that, blocks take
/// several.
int64_t count_blocks(int64_t rows, int64_t heads, int64_t batch) {
  const int64_t tiles = (rows + kRowTile - 1) / kRowTile * heads * batch;
  return tiles + tiles / 4 + 1;
}

bool is_aligned(const void* data, const Strides& strides, int64_t head_dim) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && head_dim % 8 == 0 &&
         strides.batch % 8 == 0 && strides.row % 8 == 0 && strides.head % 8 == 0;
}

template <typename AnyRows>
bool is_aligned(const AnyRows& rows, int64_t head_dim) {
  return is_aligned(rows.data, rows.strides, head_dim);
}

int32_t sums_width(int64_t head_dim) { return static_cast<int32_t>((head_dim + 15) / 16 * 16); }

/// Blocks of kKeys keys with as many stages as the device has memory for; false if not even one
/// fits.
template <typename Element, int kWidth, int kKeys>
bool launch_keys(const Launch& launch, cudaError_t& error) {
  using Shape = BackwardShape<Element, kWidth, kKeys>;
  using Memory = BackwardMemory<Shape>;
  const size_t limit = static_cast<size_t>(launch.device.shared_bytes);
  const int32_t stages = sizeof(Memory) + 2 * Memory::kStageBytes <= limit ? 2 : 1;
  const size_t bytes = sizeof(Memory) + static_cast<size_t>(stages) * Memory::kStageBytes;
  if (bytes > limit) {
    return false;
  }
  const BackwardArgs& args = launch.args;
  const auto aligned = [&](const auto& rows) { return is_aligned(rows, args.head_dim); };
  char* workspace = static_cast<char*>(launch.workspace);
  float* sums =
      launch.deterministic ? nullptr : reinterpret_cast<float*>(workspace + kCounterBytes);
  const BackwardCall call{args,
                          args.scale * kLog2E,
                          reinterpret_cast<unsigned long long*>(workspace),
                          {sums, sums_width(args.head_dim)},
                          stages,
                          aligned(args.query),
                          aligned(args.key),
                          aligned(args.value),
                          aligned(args.grad_out),
                          aligned(args.grad_key),
                          aligned(args.grad_value)};
  const int64_t blocks = std::min(
      count_blocks(args.keys, args.kv_heads, args.batch),
      static_cast<int64_t>(launch.device.multiprocessors) * std::max<int64_t>(1, Shape::kBlocks));
  error = launch_kernel(attention_backward_kernel<Element, kWidth, kKeys>, call, blocks,
                        Shape::kThreads, bytes, launch.stream);
  return true;
}

template <typename Element, int kWidth>
cudaError_t launch_queries(const Launch& launch) {
  using Shape = BackwardQueryShape<Element, kWidth>;
  const BackwardArgs& args = launch.args;
  const auto aligned = [&](const auto& rows) { return is_aligned(rows, args.head_dim); };
  const BackwardQueryCall call{args,
                               args.scale * kLog2E,
                               aligned(args.query),
                               aligned(args.key),
                               aligned(args.value),
                               aligned(args.grad_out),
                               aligned(args.grad_query)};
  return launch_kernel(backward_query_kernel<Element, kWidth>, call,
                       count_blocks(args.queries, args.heads, args.batch), Shape::kThreads,
                       sizeof(BackwardQueryMemory<Shape>), launch.stream);
}

template <typename Element>
cudaError_t round_sums(const Launch& launch) {
  const BackwardArgs& args = launch.args;
  const QuerySums sums{
      reinterpret_cast<float*>(static_cast<char*>(launch.workspace) + kCounterBytes),
      sums_width(args.head_dim)};
  const int64_t rows = args.batch * args.heads * args.queries;
  if (rows == 0) {
    return cudaSuccess;
  }
  constexpr int kThreads = 256;
  const int64_t blocks = (rows * (sums.width / 16) + kThreads - 1) / kThreads;
  if (blocks > kMaxBlocks) {
    return cudaErrorInvalidValue;
  }
  round_sums_kernel<Element><<<static_cast<unsigned>(blocks), kThreads, 0, launch.stream>>>(
      sums, args.grad_query, args.heads, args.queries, rows, static_cast<int32_t>(args.head_dim),
      args.scale, is_aligned(args.grad_query, args.head_dim));
  return cudaGetLastError();
}

template <typename Element, int kWidth>
cudaError_t launch_scalar(const Launch& launch) {
  using Shape = ScalarShape<kWidth>;
  const BackwardArgs& args = launch.args;
  const cudaError_t error =
      launch_kernel(backward_scalar_kernel<Element, kWidth, true>, args,
                    count_blocks(args.keys, args.kv_heads, args.batch), Shape::kThreads,
                    sizeof(ScalarMemory<kWidth>), launch.stream);
  if (error != cudaSuccess) {
    return error;
  }
  return launch_kernel(backward_scalar_kernel<Element, kWidth, false>, args,
                       count_blocks(args.queries, args.heads, args.batch), Shape::kThreads,
                       sizeof(ScalarMemory<kWidth>), launch.stream);
}

/// The shapes to try, largest first.
template <typename Element, int kWidth, int kKeys, int... kFewerKeys>
cudaError_t launch_tensor_cores(const Launch& launch) {
  cudaError_t error = cudaSuccess;
  if (!launch_keys<Element, kWidth, kKeys>(launch, error)) {
    if constexpr (sizeof...(kFewerKeys) > 0) {
      return launch_tensor_cores<Element, kWidth, kFewerKeys...>(launch);
    } else if constexpr (kWidth > 128) {
      return launch_scalar<Element, kWidth>(launch);
    } else {
      return cudaErrorInvalidConfiguration;  // no device from sm_80 on has so little shared memory
    }
  }
  if (error != cudaSuccess) {
    return error;
  }
  if (launch.deterministic) {
    return launch_queries<Element, kWidth>(launch);
  }
  return launch.args.is_partial ? round_sums<float>(launch) : round_sums<Element>(launch);
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

bool fits(const Rows& rows) {
  return rows.strides.row >= 0 && rows.strides.row <= std::numeric_limits<uint32_t>::max() / 2;
}

}  // namespace

size_t attention_backward_workspace(const BackwardArgs& args, bool deterministic) {
  if (args.dtype == Dtype::kFloat32) {
    return 0;
  }
  const int64_t sums = args.batch * args.heads * args.queries * sums_width(args.head_dim);
  return kCounterBytes + (deterministic ? 0 : static_cast<size_t>(sums) * sizeof(float));
}

cudaError_t attention_backward(const BackwardArgs& args, void* workspace, bool deterministic,
                               cudaStream_t stream) {
  if (args.head_dim < 1 || args.head_dim > 256 || !fits(args.key) || !fits(args.value)) {
    return cudaErrorInvalidValue;
  }
  if (args.batch == 0 || (args.queries == 0 && args.keys == 0)) {
    return cudaSuccess;
  }
  Launch launch{args, workspace, deterministic, {}, stream};
  cudaError_t error = find_device(launch.device);
  const size_t bytes = attention_backward_workspace(args, deterministic);
  if (error == cudaSuccess && bytes > 0) {
    error = cudaMemsetAsync(workspace, 0, bytes, stream);
  }
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

}  // namespace dilated::kernels::cuda

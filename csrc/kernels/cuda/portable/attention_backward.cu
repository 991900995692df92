// Launches the backward pass for 16-bit elements: blocks that keep keys and, where grad_query is
// not summed up by them, blocks that keep queries.
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/portable/attention.h"
#include "kernels/cuda/portable/attention_backward.cuh"
#include "kernels/cuda/portable/backward_query.cuh"
#include "kernels/cuda/primitives/launch.cuh"

namespace dilated::kernels::cuda::portable {
namespace {

/// One call of attention_backward.
struct Launch {
  const BackwardChoice& choice;
  const BackwardArgs& args;
  const BackwardWorkspace& workspace;
  cudaStream_t stream;
};

template <typename Element, int kWidth, int kKeys>
cudaError_t launch_keys(const Launch& launch) {
  using Shape = BackwardShape<Element, kWidth, kKeys>;
  using Memory = BackwardMemory<Shape>;
  static_assert(sizeof(Memory) == Shape::kTile.bytes(0) &&
                Memory::kStageBytes == Shape::kTile.stage_bytes());
  const BackwardArgs& args = launch.args;
  const BackwardChoice& choice = launch.choice;
  const BackwardCall call{args,
                          launch.workspace.counter,
                          {launch.workspace.query_sums, choice.sums_width},
                          choice.stages};
  const int64_t tiles = count_blocks(args.keys, args.kv_heads, args.batch, choice.row_tile);
  return launch_kernel<attention_backward_kernel<Element, kWidth, kKeys>>(
      call, std::min<int64_t>(tiles, choice.max_blocks), Shape::kThreads, choice.shared_bytes,
      launch.stream);
}

template <typename Element, int kWidth>
cudaError_t launch_queries(const Launch& launch) {
  using Shape = BackwardQueryShape<Element, kWidth>;
  constexpr size_t kBytes = sizeof(BackwardQueryMemory<Shape>);
  static_assert(kBytes <= std::max(kLeastSharedBytes, BackwardTile{kWidth, 64}.bytes(1)),
                "it must fit wherever the kernel of the keys does");
  const BackwardArgs& args = launch.args;
  return launch_kernel<backward_query_kernel<Element, kWidth>>(
      args, count_blocks(args.queries, args.heads, args.batch, launch.choice.row_tile),
      Shape::kThreads, kBytes, launch.stream);
}

template <typename Element, int kWidth, int kKeys>
cudaError_t launch_both(const Launch& launch) {
  const cudaError_t error = launch_keys<Element, kWidth, kKeys>(launch);
  const bool is_done = launch.choice.sums_width > 0 || launch.args.queries == 0;
  return error != cudaSuccess || is_done ? error : launch_queries<Element, kWidth>(launch);
}

template <typename Element>
cudaError_t launch_short(const Launch& launch) {
  switch (launch.choice.width) {
    case 32:
      return launch_both<Element, 32, kShortRowTile>(launch);
    case 64:
      return launch_both<Element, 64, kShortRowTile>(launch);
    case 128:
      return launch_both<Element, 128, kShortRowTile>(launch);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename Element>
cudaError_t launch_width(const Launch& launch) {
  const bool has_64_keys = launch.choice.tile.rows == 64;
  switch (launch.choice.width) {
    case 32:
      return launch_both<Element, 32, 128>(launch);
    case 48:
      return launch_both<Element, 48, 128>(launch);
    case 64:
      return launch_both<Element, 64, 128>(launch);
    case 96:
      return has_64_keys ? launch_both<Element, 96, 64>(launch)
                         : launch_both<Element, 96, 128>(launch);
    case 128:
      return has_64_keys ? launch_both<Element, 128, 64>(launch)
                         : launch_both<Element, 128, 128>(launch);
    case 256:
      return launch_both<Element, 256, 64>(launch);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t attention_backward(const BackwardChoice& choice, const BackwardArgs& args,
                               const BackwardWorkspace& workspace, cudaStream_t stream) {
  const Launch launch{choice, args, workspace, stream};
  return with_16_bit(args.dtype, [&]<typename Element>() {
    return choice.tile.rows == kShortRowTile ? launch_short<Element>(launch)
                                             : launch_width<Element>(launch);
  });
}

}  // namespace dilated::kernels::cuda::portable

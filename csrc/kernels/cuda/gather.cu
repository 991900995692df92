// gather and scatter: copies between a branch's lattice points and packed rows, bound by
// memory.
//
// A block takes kSlots consecutive slots of one batch entry, all heads. What depends on the slot
// alone (its piece of the sequence, the divisions) is worked out once a slot; a thread then moves
// one vector of a (slot, head) at a time.
#include <limits>
#include <type_traits>

#include "kernels/cuda/gather.h"
#include "kernels/cuda/primitives/numerics.cuh"

namespace dilated::kernels::cuda {
namespace {

constexpr int kSlots = 32, kThreads = 256;

/// A slot, with its position for a head whose lattice begins `ahead` after the piece: first +
/// ahead, if below end.
struct Slot {
  int64_t first, end,
      phase;  // phase: of the piece's beginning, within its segment, modulo the rate
};

__device__ int64_t position_of(const GatherArgs& args, const InlineOffsets& offsets,
                               const Slot& slot, int32_t head) {
  const int64_t rate = args.dilation_rate;
  const int64_t offset = offsets.given             ? offsets.values[head]
                         : args.offsets != nullptr ? __ldg(args.offsets + head)
                         : rate > head             ? head
                                                   : head % static_cast<int32_t>(rate);
  if (offset < 0) {
    return -1;
  }
  const int64_t ahead = offset - slot.phase;
  const int64_t position = slot.first + ahead + (ahead < 0 ? rate : 0);
  return position < slot.end ? position : -1;
}

/// Calls move(row or -1, slot, head, vector) for all that the block is to move. vectors: of a
/// head's row.
template <typename Move>
__device__ void for_each_vector(const GatherArgs& args, const InlineOffsets& offsets,
                                int64_t first_slot, int32_t vectors, const Move& move) {
  __shared__ Slot slots[kSlots];
  if (threadIdx.x < kSlots && first_slot + threadIdx.x < args.slots) {
    const int64_t slot = first_slot + threadIdx.x;
    const int64_t w = args.segment_length, r = args.dilation_rate;
    const int64_t first_slots = (piece_at(args, 0).end - args.start + r - 1) / r;
    const Piece piece =
        piece_at(args, slot < first_slots ? 0 : 1 + (slot - first_slots) / ((w + r - 1) / r));
    slots[threadIdx.x] = {piece.begin + (slot - piece.slot) * r, piece.end, piece.begin % w % r};
  }
  __syncthreads();
  const int32_t here =
      static_cast<int32_t>(min(static_cast<int64_t>(kSlots), args.slots - first_slot));
  const int32_t heads = static_cast<int32_t>(args.heads);
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(here) * heads * vectors; i += kThreads) {
    const int32_t row = static_cast<int32_t>(i / vectors);
    const int32_t slot = row / heads;
    const int32_t head = row - slot * heads;
    const int64_t position = position_of(args, offsets, slots[slot], head);
    move(position < 0 ? -1 : position - args.start, first_slot + slot, head,
         static_cast<int32_t>(i - static_cast<int64_t>(row) * vectors));
  }
}

/// A block's batch entry and first slot.
__device__ void find_block(const GatherArgs& args, int64_t& batch, int64_t& first_slot) {
  const int64_t blocks = (args.slots + kSlots - 1) / kSlots;
  batch = blockIdx.x / blocks;
  first_slot = (blockIdx.x - batch * blocks) * kSlots;
}

/// Vector: what a thread moves at a time, kElements of the tensor's elements.
template <typename Vector, int kElements>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ GatherForwardArgs args,
                  const __grid_constant__ InlineOffsets offsets) {
  int64_t batch, first_slot;
  find_block(args, batch, first_slot);
  constexpr int64_t kElementBytes = sizeof(Vector) / kElements;
  const auto move = [&](int64_t row, int64_t slot, int32_t head, int32_t vector) {
    const int64_t d = static_cast<int64_t>(vector) * kElements;
    const auto at = [&](const auto& rows, int64_t n) {
      return (rows.strides.offset(batch, n, head) + d) * kElementBytes;
    };
    Vector values{};
    if (row >= 0) {
      values = *reinterpret_cast<const Vector*>(static_cast<const char*>(args.rows.data) +
                                                at(args.rows, row));
    }
    *reinterpret_cast<Vector*>(static_cast<char*>(args.packed.data) + at(args.packed, slot)) =
        values;
  };
  for_each_vector(args, offsets, first_slot, static_cast<int32_t>(args.head_dim / kElements), move);
}

/// kElements elements, as one access.
template <typename Element, int kElements>
struct alignas(sizeof(Element) * kElements) Vector {
  Element elements[kElements];
};

template <typename Element>
__device__ Element add(Element a, Element b) {
  if constexpr (std::is_same_v<Element, double>) {
    return a + b;
  } else {
    return from_float<Element>(to_float(a) + to_float(b));
  }
}

template <typename Element, int kElements, bool kAccumulate>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const __grid_constant__ ScatterArgs args,
                   const __grid_constant__ InlineOffsets offsets) {
  int64_t batch, first_slot;
  find_block(args, batch, first_slot);
  using Packet = Vector<Element, kElements>;
  const auto move = [&](int64_t row, int64_t slot, int32_t head, int32_t vector) {
    if (row < 0) {
      return;
    }
    const int64_t d = static_cast<int64_t>(vector) * kElements;
    const auto at = [&](const auto& rows, int64_t n) {
      return rows.strides.offset(batch, n, head) + d;
    };
    Packet values = *reinterpret_cast<const Packet*>(static_cast<const Element*>(args.packed.data) +
                                                     at(args.packed, slot));
    Packet* to =
        reinterpret_cast<Packet*>(static_cast<Element*>(args.rows.data) + at(args.rows, row));
    if constexpr (kAccumulate) {
      const Packet sum = *to;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        values.elements[e] = add(sum.elements[e], values.elements[e]);
      }
    }
    *to = values;
  };
  for_each_vector(args, offsets, first_slot, static_cast<int32_t>(args.head_dim / kElements), move);
}

template <typename Args>
cudaError_t launch(void (*kernel)(Args, InlineOffsets), const Args& args,
                   const InlineOffsets& offsets, cudaStream_t stream) {
  const int64_t blocks = (args.slots + kSlots - 1) / kSlots * args.batch;
  if (blocks == 0 || args.heads == 0 || args.head_dim == 0) {
    return cudaSuccess;
  }
  if (blocks > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidValue;
  }
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args, offsets);
  return cudaGetLastError();
}

/// In 16-byte vectors where head_dim and all addresses allow, else element by element.
template <typename Element>
cudaError_t gather_elements(const GatherForwardArgs& args, const InlineOffsets& offsets,
                            cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(Element);
  if (args.rows.is_aligned && args.packed.is_aligned) {
    return launch(gather_kernel<int4, kVector>, args, offsets, stream);
  }
  return launch(gather_kernel<Element, 1>, args, offsets, stream);
}

template <typename Element, bool kAccumulate>
cudaError_t scatter_elements(const ScatterArgs& args, const InlineOffsets& offsets,
                             cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(Element);
  if (args.rows.is_aligned && args.packed.is_aligned) {
    return launch(scatter_kernel<Element, kVector, kAccumulate>, args, offsets, stream);
  }
  return launch(scatter_kernel<Element, 1, kAccumulate>, args, offsets, stream);
}

cudaError_t copy_rows(const ScatterArgs& args, const InlineOffsets& offsets, cudaStream_t stream) {
  switch (args.dtype) {
    case Dtype::kFloat16:
    case Dtype::kBFloat16:
      return scatter_elements<uint16_t, false>(args, offsets, stream);
    case Dtype::kFloat32:
      return scatter_elements<uint32_t, false>(args, offsets, stream);
    case Dtype::kFloat64:
      return scatter_elements<uint64_t, false>(args, offsets, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t add_rows(const ScatterArgs& args, const InlineOffsets& offsets, cudaStream_t stream) {
  switch (args.dtype) {
    case Dtype::kFloat16:
      return scatter_elements<__half, true>(args, offsets, stream);
    case Dtype::kBFloat16:
      return scatter_elements<__nv_bfloat16, true>(args, offsets, stream);
    case Dtype::kFloat32:
      return scatter_elements<float, true>(args, offsets, stream);
    case Dtype::kFloat64:
      return scatter_elements<double, true>(args, offsets, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t gather(const GatherForwardArgs& args, const InlineOffsets& offsets,
                   cudaStream_t stream) {
  switch (args.dtype) {
    case Dtype::kFloat16:
    case Dtype::kBFloat16:
      return gather_elements<uint16_t>(args, offsets, stream);
    case Dtype::kFloat32:
      return gather_elements<uint32_t>(args, offsets, stream);
    case Dtype::kFloat64:
      return gather_elements<uint64_t>(args, offsets, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t scatter(const ScatterArgs& args, const InlineOffsets& offsets, cudaStream_t stream) {
  return args.accumulate ? add_rows(args, offsets, stream) : copy_rows(args, offsets, stream);
}

}  // namespace dilated::kernels::cuda

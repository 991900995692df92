// gather and scatter, in parallel over slots.
#include "kernels/cpu/gather.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/half.h"

namespace dilated::kernels::cpu {
namespace {

using baseline::BFloat16, baseline::Half, baseline::narrow, baseline::widen;

constexpr int64_t kElementsPerTask = 32768;

/// Calls work(batch, slot, head, row) for every slot of every head, on torch's threads; row is -1
/// where the slot has no position.
template <typename Work>
void for_each_slot(const GatherArgs& args, const Work& work) {
  const int64_t grain =
      std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, args.heads * args.head_dim));
  at::parallel_for(0, args.batch * args.slots, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slot = i % args.slots;
      for (int64_t head = 0; head < args.heads; ++head) {
        const int64_t position = slot_position(args, head_offset(args, head), slot);
        work(i / args.slots, slot, head, position < 0 ? -1 : position - args.start);
      }
    }
  });
}

template <typename Element>
void gather_elements(const GatherForwardArgs& args) {
  const auto bytes = static_cast<size_t>(args.head_dim) * sizeof(Element);
  for_each_slot(args, [&](int64_t batch, int64_t slot, int64_t head, int64_t row) {
    Element* to = row_at<Element>(args.packed, batch, slot, head);
    if (row < 0) {
      std::memset(to, 0, bytes);
    } else {
      std::memcpy(to, row_at<Element>(args.rows, batch, row, head), bytes);
    }
  });
}

template <typename Element>
void scatter_elements(const ScatterArgs& args) {
  for_each_slot(args, [&](int64_t batch, int64_t slot, int64_t head, int64_t row) {
    if (row < 0) {
      return;
    }
    const Element* from = row_at<Element>(args.packed, batch, slot, head);
    Element* to = row_at<Element>(args.rows, batch, row, head);
    if (!args.accumulate) {
      std::memcpy(to, from, static_cast<size_t>(args.head_dim) * sizeof(Element));
      return;
    }
    for (int64_t d = 0; d < args.head_dim; ++d) {
      narrow(widen(to[d]) + widen(from[d]), to[d]);
    }
  });
}

}  // namespace

void gather(const GatherForwardArgs& args) {
  switch (args.dtype) {
    case Dtype::kFloat64:
      return gather_elements<uint64_t>(args);
    case Dtype::kFloat32:
      return gather_elements<uint32_t>(args);
    case Dtype::kFloat16:
    case Dtype::kBFloat16:
      return gather_elements<uint16_t>(args);
  }
}

void scatter(const ScatterArgs& args) {
  switch (args.dtype) {
    case Dtype::kFloat64:
      return scatter_elements<double>(args);
    case Dtype::kFloat32:
      return scatter_elements<float>(args);
    case Dtype::kFloat16:
      return scatter_elements<Half>(args);
    case Dtype::kBFloat16:
      return scatter_elements<BFloat16>(args);
  }
}

}  // namespace dilated::kernels::cpu

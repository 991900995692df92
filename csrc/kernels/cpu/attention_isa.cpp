// The tile kernels of one instruction set. Compiled once for each, with DILATED_ISA naming the
// inner namespace.
//
// No header of the standard library but <cstdint> and <cstddef>: the linker might keep an inline
// function compiled here for a newer machine as everyone's copy.
#include "kernels/cpu/backward_keys.h"
#include "kernels/cpu/backward_queries.h"
#include "kernels/cpu/forward_tile.h"

namespace dilated::kernels::cpu::DILATED_ISA {
namespace {

/// Calls body with a value of the stored type.
template <typename Body>
auto with_element(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::kFloat16:
      return body(Half{});
    case Dtype::kBFloat16:
      return body(BFloat16{});
    case Dtype::kFloat64:
      return body(double{});
    case Dtype::kFloat32:
    default:
      return body(float{});
  }
}

template <typename T>
size_t scratch_bytes_of(int64_t head_dim) {
  const size_t forward =
      sizeof(ForwardScratch<T>) + sizeof(T) * ForwardScratch<T>::panel_numbers(head_dim);
  const size_t backward =
      sizeof(BackwardScratch<T>) + sizeof(T) * BackwardScratch<T>::panel_numbers(head_dim);
  return forward > backward ? forward : backward;
}

size_t scratch_bytes(const AttentionArgs& args) {
  return args.dtype == Dtype::kFloat64 ? scratch_bytes_of<double>(args.head_dim)
                                       : scratch_bytes_of<float>(args.head_dim);
}

void forward(const ForwardArgs& args, const TileTask& task, void* scratch) {
  with_element(args.dtype,
               [&]<typename Element>(Element) { forward_tile<Element>(args, task, scratch); });
}

void backward_keys(const BackwardArgs& args, const TileTask& task, const MutableRows& sums,
                   void* scratch) {
  with_element(args.dtype, [&]<typename Element>(Element) {
    run_backward(BackwardKeysTile<Element>(
        args, task, sums, backward_scratch<Compute<Element>>(scratch, args.head_dim)));
  });
}

void backward_queries(const BackwardArgs& args, const TileTask& task, void* scratch) {
  with_element(args.dtype, [&]<typename Element>(Element) {
    run_backward(BackwardQueriesTile<Element>(
        args, task, backward_scratch<Compute<Element>>(scratch, args.head_dim)));
  });
}

void round_row(Dtype dtype, const void* from, void* to, int64_t head_dim) {
  with_element(dtype, [&]<typename Element>(Element) {
    for (int64_t d = 0; d < head_dim; ++d) {
      narrow(static_cast<const Compute<Element>*>(from)[d], static_cast<Element*>(to)[d]);
    }
  });
}

}  // namespace

const TileKernels& tile_kernels() {
  static constexpr TileKernels kKernels{scratch_bytes, forward, backward_keys, backward_queries,
                                        round_row};
  return kKernels;
}

}  // namespace dilated::kernels::cpu::DILATED_ISA

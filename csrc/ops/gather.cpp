// gather, scatter_add and their in-place forms: checks, the CPU's kernels, fake tensors.
#include "ops/gather.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "kernels/cpu/gather.h"
#include "ops/checks.h"

namespace dilated::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

/// Slots of `length` positions from `start` on; see kernels/gather.h. Works on symbolic lengths.
template <typename Int>
Int count_slots(const Int& length, const Int& w, int64_t r, int64_t start) {
  const Int to_first_end = w - Int(start) % w;
  if (length <= to_first_end) {
    return (length + (r - 1)) / r;
  }
  const Int beyond = length - to_first_end;
  return (to_first_end + r - 1) / r + beyond / w * ((w + r - 1) / r) + (beyond % w + (r - 1)) / r;
}

std::array<c10::SymInt, 4> packed_sizes(const at::Tensor& input, const BranchCall& branch) {
  return {input.sym_size(0),
          count_slots<c10::SymInt>(input.sym_size(1), branch.segment_length, branch.dilation_rate,
                                   branch.start),
          input.sym_size(2), input.sym_size(3)};
}

void check_packed(const at::Tensor& packed, const at::Tensor& rows, const BranchCall& branch) {
  check_tensor(packed, "packed");
  const auto sizes = packed_sizes(rows, branch);
  TORCH_CHECK_VALUE(packed.sym_sizes() == c10::SymIntArrayRef(sizes),
                    "packed: must have the shape that gather gives, ", c10::SymIntArrayRef(sizes),
                    ", got ", packed.sym_sizes());
  TORCH_CHECK_VALUE(packed.scalar_type() == rows.scalar_type() && packed.device() == rows.device(),
                    "packed: must have the dtype and device of the rows, ",
                    dtype_name(rows.scalar_type()), " on ", rows.device(), ", got ",
                    dtype_name(packed.scalar_type()), " on ", packed.device());
}

void check_head_offsets(const at::Tensor& input, const BranchCall& branch) {
  if (!branch.head_offsets.has_value()) {
    return;
  }
  const at::Tensor& offsets = *branch.head_offsets;
  check_tensor(offsets, "head_offsets");
  check_table(offsets, input, "head_offsets", "[heads]");
  TORCH_CHECK_VALUE(
      offsets.dim() == 1 && offsets.sym_size(0) == input.sym_size(2) && offsets.is_contiguous(),
      "head_offsets: must be contiguous and [heads] = [", input.sym_size(2), "], got ",
      offsets.sym_sizes(), " with strides ", offsets.sym_strides());
  if (input.device().is_meta()) {
    return;
  }
  for (int64_t head = 0; head < offsets.size(0); ++head) {
    const int64_t offset = offsets.const_data_ptr<int64_t>()[head];
    TORCH_CHECK_VALUE(-1 <= offset && offset < branch.dilation_rate,
                      "head_offsets: must be -1 (head not in the branch) or at least 0 and below "
                      "dilation_rate, ",
                      branch.dilation_rate, ", got ", offset, " for head ", head);
  }
}

void fill(const at::Tensor& input, const BranchCall& branch, kernels::GatherArgs& args) {
  args.dtype = dtype_of(input);
  args.batch = input.size(0);
  args.length = input.size(1);
  args.heads = input.size(2);
  args.head_dim = input.size(3);
  args.start = branch.start;
  // A segment that ends after the stretch cuts nothing, whatever its length.
  args.segment_length = std::min(branch.segment_length.expect_int(),
                                 std::max<int64_t>(1, branch.start + args.length));
  args.dilation_rate = branch.dilation_rate;
  args.slots = count_slots(args.length, args.segment_length, args.dilation_rate, args.start);
  args.offsets = nullptr;
}

const int64_t* host_offsets(const BranchCall& branch) {
  return branch.head_offsets.has_value() ? branch.head_offsets->const_data_ptr<int64_t>() : nullptr;
}

at::Tensor gather_cpu(const at::Tensor& input, c10::SymInt segment_length, int64_t dilation_rate,
                      const OptionalTensor& head_offsets, int64_t start) {
  const BranchCall branch{segment_length, dilation_rate, head_offsets, start};
  GatherCall call = prepare_gather(input, branch);
  call.args.offsets = host_offsets(branch);
  kernels::cpu::gather(call.args);
  return call.packed;
}

void gather_into_cpu(at::Tensor& packed, const at::Tensor& input, c10::SymInt segment_length,
                     int64_t dilation_rate, const OptionalTensor& head_offsets, int64_t start) {
  const BranchCall branch{segment_length, dilation_rate, head_offsets, start};
  GatherCall call = prepare_gather(input, branch, packed);
  call.args.offsets = host_offsets(branch);
  kernels::cpu::gather(call.args);
}

void scatter_into_cpu(at::Tensor& rows, const at::Tensor& packed, c10::SymInt segment_length,
                      int64_t dilation_rate, const OptionalTensor& head_offsets, int64_t start,
                      bool accumulate) {
  const BranchCall branch{segment_length, dilation_rate, head_offsets, start};
  ScatterCall call = prepare_scatter(rows, packed, branch, accumulate);
  call.args.offsets = host_offsets(branch);
  kernels::cpu::scatter(call.args);
}

at::Tensor scatter_add_cpu(const at::Tensor& input, const at::Tensor& packed,
                           c10::SymInt segment_length, int64_t dilation_rate,
                           const OptionalTensor& head_offsets, int64_t start) {
  check_scatter(input, packed, {segment_length, dilation_rate, head_offsets, start});
  at::Tensor rows = input.clone(at::MemoryFormat::Contiguous);
  scatter_into_cpu(rows, packed, segment_length, dilation_rate, head_offsets, start, true);
  return rows;
}

/// Whether no two elements can lie in one place: each stride reaches past all that the smaller ones
/// span. Tensors that are neither slices nor permutations of a contiguous one may fail it wrongly.
bool has_own_places(const at::Tensor& tensor) {
  std::array<std::pair<int64_t, int64_t>, 4> dims;  // stride, size
  for (int64_t dim = 0; dim < 4; ++dim) {
    dims[static_cast<size_t>(dim)] = {tensor.stride(dim), tensor.size(dim)};
  }
  std::sort(dims.begin(), dims.end());
  int64_t span = 1;
  for (const auto& [stride, size] : dims) {
    if (size > 1 && stride < span) {
      return false;
    }
    span += stride * (size - 1);
  }
  return true;
}

/// That kernels can write to the tensor in place.
void check_writable(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(readable(tensor).is_same(tensor), name,
                    ": must be contiguous in its last dimension, with rows less than 2^31 elements "
                    "apart, got sizes ",
                    tensor.sizes(), " and strides ", tensor.strides());
  TORCH_CHECK_VALUE(tensor.numel() == 0 || has_own_places(tensor), name,
                    ": must have a place of its own for every element, got sizes ", tensor.sizes(),
                    " and strides ", tensor.strides());
}

at::Tensor gather_meta(const at::Tensor& input, c10::SymInt segment_length, int64_t dilation_rate,
                       const OptionalTensor& head_offsets, int64_t start) {
  const BranchCall branch{segment_length, dilation_rate, head_offsets, start};
  check_branch(input, branch, "input");
  return input.new_empty_symint(packed_sizes(input, branch));
}

void gather_into_meta(at::Tensor& packed, const at::Tensor& input, c10::SymInt segment_length,
                      int64_t dilation_rate, const OptionalTensor& head_offsets, int64_t start) {
  const BranchCall branch{segment_length, dilation_rate, head_offsets, start};
  check_branch(input, branch, "input");
  check_packed(packed, input, branch);
}

void scatter_into_meta(at::Tensor& rows, const at::Tensor& packed, c10::SymInt segment_length,
                       int64_t dilation_rate, const OptionalTensor& head_offsets, int64_t start,
                       bool /*accumulate*/) {
  const BranchCall branch{segment_length, dilation_rate, head_offsets, start};
  check_branch(rows, branch, "rows");
  check_packed(packed, rows, branch);
}

at::Tensor scatter_add_meta(const at::Tensor& input, const at::Tensor& packed,
                            c10::SymInt segment_length, int64_t dilation_rate,
                            const OptionalTensor& head_offsets, int64_t start) {
  check_scatter(input, packed, {segment_length, dilation_rate, head_offsets, start});
  return input.new_empty_symint(input.sym_sizes());
}

}  // namespace

void check_branch(const at::Tensor& input, const BranchCall& branch, const char* name) {
  check_input(input, name);
  const std::optional<int64_t> length = branch.segment_length.maybe_as_int();
  TORCH_CHECK_VALUE(!length.has_value() || *length > 0, "segment_length: must be positive, got ",
                    branch.segment_length);
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(0 < branch.dilation_rate && branch.dilation_rate <= kMax,
                    "dilation_rate: must be positive and below 2^31, got ", branch.dilation_rate);
  const int64_t rows = input.sym_size(1).maybe_as_int().value_or(0);
  TORCH_CHECK_VALUE(0 <= branch.start && branch.start <= kMax - rows,
                    "start: must be at least 0, and below 2^31 with the rows added, got start ",
                    branch.start, ", rows ", input.sym_size(1));
  check_head_offsets(input, branch);
}

void check_scatter(const at::Tensor& input, const at::Tensor& packed, const BranchCall& branch) {
  check_branch(input, branch, "input");
  check_packed(packed, input, branch);
}

GatherCall prepare_gather(const at::Tensor& input, const BranchCall& branch,
                          const OptionalTensor& packed) {
  check_branch(input, branch, "input");
  GatherCall call;
  fill(input, branch, call.args);
  call.rows = readable(input);
  if (packed.has_value()) {
    check_packed(*packed, input, branch);
    check_writable(*packed, "packed");
    check_apart("packed", *packed, {{"input", &input}});
    call.packed = *packed;
  } else {
    call.packed = at::empty({call.args.batch, call.args.slots, call.args.heads, call.args.head_dim},
                            input.options());
  }
  call.args.rows = rows_of(call.rows);
  call.args.packed = mutable_rows_of(call.packed);
  return call;
}

ScatterCall prepare_scatter(const at::Tensor& rows, const at::Tensor& packed,
                            const BranchCall& branch, bool accumulate) {
  check_branch(rows, branch, "rows");
  check_packed(packed, rows, branch);
  check_writable(rows, "rows");
  check_apart("rows", rows, {{"packed", &packed}});
  ScatterCall call;
  fill(rows, branch, call.args);
  call.rows = rows;
  call.packed = readable(packed);
  call.args.rows = mutable_rows_of(call.rows);
  call.args.packed = rows_of(call.packed);
  call.args.accumulate = accumulate;
  return call;
}

}  // namespace dilated::ops

TORCH_LIBRARY_IMPL(dilated, CPU, m) {
  m.impl("gather", &dilated::ops::gather_cpu);
  m.impl("scatter_add", &dilated::ops::scatter_add_cpu);
  m.impl("gather_into", &dilated::ops::gather_into_cpu);
  m.impl("scatter_into", &dilated::ops::scatter_into_cpu);
}

TORCH_LIBRARY_IMPL(dilated, Meta, m) {
  m.impl("gather", &dilated::ops::gather_meta);
  m.impl("scatter_add", &dilated::ops::scatter_add_meta);
  m.impl("gather_into", &dilated::ops::gather_into_meta);
  m.impl("scatter_into", &dilated::ops::scatter_into_meta);
}

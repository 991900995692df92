// Which instruction set, and which thread does which tile.
#include "kernels/cpu/attention.h"

#include <ATen/Parallel.h>
#include <dilated/pattern_layout.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <new>

#include "kernels/cpu/tile_kernels.h"

namespace dilated::kernels::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

struct FreeAligned {
  void operator()(std::byte* memory) const { operator delete(memory, kAlignment); }
};
using Buffer = std::unique_ptr<std::byte, FreeAligned>;

Buffer allocate(size_t bytes) { return Buffer(static_cast<std::byte*>(operator new(bytes, kAlignment))); }

const TileKernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kAvx512:
      return avx512::tile_kernels();
    case Isa::kAvx2:
      return avx2::tile_kernels();
    case Isa::kBaseline:
      break;
  }
#else
  static_cast<void>(isa);
#endif
  return baseline::tile_kernels();
}

std::atomic<const TileKernels*>& chosen_kernels() {
  static std::atomic<const TileKernels*> chosen{&kernels_of(supports(Isa::kAvx512) ? Isa::kAvx512
                                                            : supports(Isa::kAvx2) ? Isa::kAvx2
                                                                                   : Isa::kBaseline)};
  return chosen;
}

/// Calls work(task, scratch) for every task. Threads take the next one as they finish, so tasks may differ in length;
/// which thread does which never changes a result.
template <typename Work>
void for_each_task(int64_t tasks, size_t scratch_bytes, const Work& work) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const Buffer scratch = allocate(scratch_bytes);
    for (int64_t task = next++; task < tasks; task = next++) {
      work(task, scratch.get());
    }
  });
}

/// The heads of one class; `slot` counts them.
struct ClassHeads {
  const int32_t* heads;
  int32_t count;
};

ClassHeads heads_of(const TableView& table, int32_t head_class) {
  const int32_t* begin = table.class_begin() + head_class;
  return {table.class_heads() + begin[0], begin[1] - begin[0]};
}

/// Calls work(TileTask, scratch) for every tile, head of its class and batch. Neighbouring tasks are tiles of the same
/// head: they share columns, and with them the cache.
template <typename Work>
void for_each_tile(const TableView& table, int64_t batch, size_t scratch_bytes, const Work& work) {
  const int64_t tiles = table.table->tiles;
  const int64_t slots = table.table->max_class_heads;
  for_each_task(batch * slots * tiles, scratch_bytes, [&](int64_t task, void* scratch) {
    const Tile& tile = table.tiles()[task % tiles];
    const int64_t slot = task / tiles % slots;
    const ClassHeads heads = heads_of(table, table.groups()[tile.group].head_class);
    if (slot < heads.count) {
      work(TileTask{task / tiles / slots, heads.heads[slot], &tile}, scratch);
    }
  });
}

/// As above, but the tiles of one span and head are one task, in order: only they share query rows.
template <typename Work>
void for_each_span(const TableView& table, int64_t batch, size_t scratch_bytes, const Work& work) {
  const int64_t classes = table.table->classes;
  const int64_t slots = table.table->max_class_heads;
  const int64_t stretches = table.table->spans * classes;
  for_each_task(batch * slots * stretches, scratch_bytes, [&](int64_t task, void* scratch) {
    const int64_t stretch = task % stretches;
    const int64_t slot = task / stretches % slots;
    const ClassHeads heads = heads_of(table, static_cast<int32_t>(stretch % classes));
    for (int32_t t = table.span_tiles()[stretch]; slot < heads.count && t < table.span_tiles()[stretch + 1]; ++t) {
      work(TileTask{task / stretches / slots, heads.heads[slot], &table.tiles()[t]}, scratch);
    }
  });
}

size_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return 8;
    case Dtype::kFloat32:
      return 4;
    case Dtype::kFloat16:
    case Dtype::kBFloat16:
      break;
  }
  return 2;
}

/// The address of a row of all heads' vectors.
std::byte* row_of(const MutableRows& rows, size_t element, int64_t batch, int64_t row, int64_t head) {
  const int64_t at = batch * rows.strides.batch + row * rows.strides.row + head * rows.strides.head;
  return static_cast<std::byte*>(rows.data) + static_cast<int64_t>(element) * at;
}

template <typename Work>
void for_each_query_row(const BackwardArgs& args, const Work& work) {
  constexpr int64_t kRowsPerTask = 256;
  at::parallel_for(0, args.batch * args.queries, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t head = 0; head < args.heads; ++head) {
        work(i / args.queries, i % args.queries, head);
      }
    }
  });
}

void backward_by_span(const BackwardArgs& args, const TileKernels& kernels) {
  const size_t element = size_of(args.dtype);
  const auto row_bytes = static_cast<size_t>(args.head_dim) * std::max<size_t>(element, sizeof(float));
  // Half precisions are summed up beside grad_query and rounded once, at the end.
  const bool in_place = element >= sizeof(float);
  Buffer buffer;
  MutableRows sums = args.grad_query;
  if (!in_place) {
    buffer = allocate(static_cast<size_t>(args.batch * args.queries * args.heads) * row_bytes);
    const int64_t row = args.heads * args.head_dim;
    sums = {buffer.get(), {args.queries * row, row, args.head_dim}};
  }
  const size_t sum_element = std::max<size_t>(element, sizeof(float));
  for_each_query_row(args, [&](int64_t batch, int64_t row, int64_t head) {
    std::byte* to = row_of(sums, sum_element, batch, row, head);
    std::fill(to, to + row_bytes, std::byte{0});
  });
  for_each_span(PatternView{args.pattern}.transposed(), args.batch, kernels.scratch_bytes(args),
                [&](const TileTask& task, void* scratch) {
                  kernels.backward_keys(args, task, {sums.data, sums.strides}, scratch);
                });
  if (!in_place) {
    for_each_query_row(args, [&](int64_t batch, int64_t row, int64_t head) {
      kernels.round_row(args.dtype, row_of(sums, sum_element, batch, row, head),
                        row_of(args.grad_query, element, batch, row, head), args.head_dim);
    });
  }
}

void backward_by_tile(const BackwardArgs& args, const TileKernels& kernels) {
  const PatternView pattern{args.pattern};
  for_each_tile(pattern.transposed(), args.batch, kernels.scratch_bytes(args),
                [&](const TileTask& task, void* scratch) { kernels.backward_keys(args, task, {}, scratch); });
  for_each_tile(pattern.forward(), args.batch, kernels.scratch_bytes(args),
                [&](const TileTask& task, void* scratch) { kernels.backward_queries(args, task, scratch); });
}

}  // namespace

void attention_forward(const ForwardArgs& args) {
  const TileKernels& kernels = *chosen_kernels().load();
  for_each_tile(PatternView{args.pattern}.forward(), args.batch, kernels.scratch_bytes(args),
                [&](const TileTask& task, void* scratch) { kernels.forward(args, task, scratch); });
}

void attention_backward(const BackwardArgs& args) {
  const TileKernels& kernels = *chosen_kernels().load();
  const int64_t tasks = args.batch * args.kv_heads * PatternView{args.pattern}.transposed().table->spans;
  if (splits_by_span(tasks, at::get_num_threads())) {
    backward_by_span(args, kernels);
  } else {
    backward_by_tile(args, kernels);
  }
}

bool splits_by_span(int64_t span_tasks, int64_t threads) {
  // Tasks of equal length are done in `rounds` turns of all threads; five products a pair against seven.
  const int64_t rounds = (span_tasks + threads - 1) / threads;
  return 5 * rounds * threads <= 7 * span_tasks;
}

bool supports(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (isa) {
    case Isa::kAvx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    case Isa::kAvx2:
      return avx2;
    case Isa::kBaseline:
      break;
  }
#endif
  return isa == Isa::kBaseline;
}

void use_isa(Isa isa) { chosen_kernels().store(&kernels_of(isa)); }

}  // namespace dilated::kernels::cpu

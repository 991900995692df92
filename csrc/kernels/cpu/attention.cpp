// Chooses the instruction set and hands tiles to threads.
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

Buffer allocate(size_t bytes) {
  return Buffer(static_cast<std::byte*>(operator new(bytes, kAlignment)));
}

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
                                                            : supports(Isa::kAvx2)
                                                                ? Isa::kAvx2
                                                                : Isa::kBaseline)};
  return chosen;
}

/// Calls work(task, scratch) for every task. A thread that finishes takes the next, so tasks may
/// differ in length; which thread runs a task never changes a result.
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

/// Calls work(TileTask, scratch) for tiles begin <= t < end of one head; tiles that follow each
/// other in a group, at one origin, are one task and share their columns.
template <typename Work>
void for_joined_tiles(const TableView& table, int32_t begin, int32_t end, int64_t batch,
                      int64_t slot, void* scratch, const Work& work) {
  while (begin < end) {
    Tile joined = table.tiles()[begin];
    for (++begin; begin < end; ++begin) {
      const Tile& next = table.tiles()[begin];
      const bool follows =
          next.group == joined.group && next.origin == joined.origin &&
          next.first_row == joined.first_row + joined.rows &&
          (joined.first_window < 0 || next.first_window == joined.first_window + joined.rows);
      if (!follows) {
        break;
      }
      joined.rows += next.rows;
    }
    const ClassHeads heads = heads_of(table, table.groups()[joined.group].head_class);
    if (slot < heads.count) {
      work(TileTask{batch, heads.heads[slot], joined}, scratch);
    }
  }
}

/// Tiles of one head that a task takes: up to kMost, which share columns, while plenty of tasks are
/// left. Independent of the number of threads, since what is joined decides how sums round.
int64_t tiles_per_task(int64_t tiles) {
  constexpr int64_t kPlenty = 128, kMost = 4;
  return std::clamp<int64_t>(tiles / kPlenty, 1, kMost);
}

/// Calls work(TileTask, scratch) for every tile, head of its class and batch. Neighbouring tasks
/// are tiles of the same head: they share columns, and with them the cache.
template <typename Work>
void for_each_tile(const TableView& table, int64_t batch, size_t scratch_bytes, const Work& work) {
  const int64_t tiles = table.table->tiles;
  const int64_t slots = table.table->max_class_heads;
  const int64_t step = tiles_per_task(batch * slots * tiles);
  const int64_t stretches = (tiles + step - 1) / step;
  for_each_task(batch * slots * stretches, scratch_bytes, [&](int64_t task, void* scratch) {
    const int64_t begin = task % stretches * step;
    const int64_t end = std::min(begin + step, tiles);
    for_joined_tiles(table, static_cast<int32_t>(begin), static_cast<int32_t>(end),
                     task / stretches / slots, task / stretches % slots, scratch, work);
  });
}

/// As above, but a task is all tiles of one span, class and head, in order: only these add to the
/// same query rows.
template <typename Work>
void for_each_span(const TableView& table, int64_t batch, size_t scratch_bytes, const Work& work) {
  const int64_t slots = table.table->max_class_heads;
  const int64_t classes = table.table->classes;
  const int64_t stretches = table.table->spans * classes;
  for_each_task(batch * slots * stretches, scratch_bytes, [&](int64_t task, void* scratch) {
    const int64_t head_class = task % classes;
    const int32_t* span = table.span_tiles() + task % stretches / classes;
    for_joined_tiles(table, span[0], span[1], task / stretches / slots, task / stretches % slots,
                     scratch, [&](const TileTask& tiles, void* memory) {
                       if (table.groups()[tiles.tile.group].head_class == head_class) {
                         work(tiles, memory);
                       }
                     });
  });
}

/// The address of a row of a head.
std::byte* row_of(const MutableRows& rows, int64_t batch, int64_t row, int64_t head) {
  return static_cast<std::byte*>(rows.data) +
         rows.element_bytes * rows.strides.offset(batch, row, head);
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
  // 16-bit gradients are summed in a buffer and rounded once, at the end.
  const bool in_place = args.grad_query.element_bytes > 2;
  Buffer buffer;
  MutableRows sums = args.grad_query;
  if (!in_place) {
    const int64_t row = args.heads * args.head_dim;
    buffer = allocate(static_cast<size_t>(args.batch * args.queries * row) * sizeof(float));
    sums = {buffer.get(), {args.queries * row, row, args.head_dim}, sizeof(float), false};
  }
  for_each_query_row(args, [&](int64_t batch, int64_t row, int64_t head) {
    std::byte* to = row_of(sums, batch, row, head);
    std::fill(to, to + args.head_dim * sums.element_bytes, std::byte{0});
  });
  for_each_span(PatternView{args.pattern}.transposed(), args.batch, kernels.scratch_bytes(args),
                [&](const TileTask& task, void* scratch) {
                  kernels.backward_keys(args, task, sums, scratch);
                });
  if (!in_place) {
    for_each_query_row(args, [&](int64_t batch, int64_t row, int64_t head) {
      kernels.round_row(args.dtype, row_of(sums, batch, row, head),
                        row_of(args.grad_query, batch, row, head), args.head_dim);
    });
  }
}

void backward_by_tile(const BackwardArgs& args, const TileKernels& kernels) {
  const PatternView pattern{args.pattern};
  for_each_tile(
      pattern.transposed(), args.batch, kernels.scratch_bytes(args),
      [&](const TileTask& task, void* scratch) { kernels.backward_keys(args, task, {}, scratch); });
  for_each_tile(
      pattern.forward(), args.batch, kernels.scratch_bytes(args),
      [&](const TileTask& task, void* scratch) { kernels.backward_queries(args, task, scratch); });
}

}  // namespace

void attention_forward(const ForwardArgs& args) {
  const TileKernels& kernels = *chosen_kernels().load();
  for_each_tile(PatternView{args.pattern}.forward(), args.batch, kernels.scratch_bytes(args),
                [&](const TileTask& task, void* scratch) { kernels.forward(args, task, scratch); });
}

void attention_backward(const BackwardArgs& args, bool deterministic) {
  const TileKernels& kernels = *chosen_kernels().load();
  const int64_t tasks =
      args.batch * args.kv_heads * PatternView{args.pattern}.transposed().table->spans;
  if (!deterministic && splits_by_span(tasks, at::get_num_threads())) {
    backward_by_span(args, kernels);
  } else {
    backward_by_tile(args, kernels);
  }
}

bool splits_by_span(int64_t span_tasks, int64_t threads) {
  // If tasks are equal, all threads are busy for `rounds` turns. By span a pair takes five
  // products, by tile seven.
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

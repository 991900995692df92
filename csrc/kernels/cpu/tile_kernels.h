// What attention.cpp calls: the work on one tile, once per instruction set.
#pragma once

#include <dilated/pattern_layout.h>

#include <cstddef>

#include "kernels/attention.h"

namespace dilated::kernels::cpu {

/// Rows first_row .. first_row + rows - 1 of a group at an origin (one tile, or several that follow
/// each other) of one head: a query head, or a KV head where the table is the transposed one.
struct TileTask {
  int64_t batch, head;
  Tile tile;

  /// Which sequence it is, for dropout: where the pattern is of several, the batch is one entry.
  [[gnu::always_inline]] inline int64_t entry() const { return batch + tile.sequence; }
};

/// The functions of one instruction set. `scratch` belongs to one thread, is 64-byte aligned, of
/// scratch_bytes() and uninitialised.
struct TileKernels {
  size_t (*scratch_bytes)(const AttentionArgs&);
  /// out and lse of the tile's rows.
  void (*forward)(const ForwardArgs&, const TileTask&, void* scratch);
  /// Transposed table: writes grad_key and grad_value of the tile's rows and adds these keys' share
  /// of grad_query to `sums`, in the type of the arithmetic, unless their data is nullptr.
  void (*backward_keys)(const BackwardArgs&, const TileTask&, const MutableRows& sums,
                        void* scratch);
  /// Forward table: writes grad_query of the tile's rows.
  void (*backward_queries)(const BackwardArgs&, const TileTask&, void* scratch);
  /// Rounds one row, [head_dim], from the type of the arithmetic to the dtype.
  void (*round_row)(Dtype, const void* from, void* to, int64_t head_dim);
};

namespace baseline {
const TileKernels& tile_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const TileKernels& tile_kernels();
}
namespace avx512 {
const TileKernels& tile_kernels();
}
#endif

}  // namespace dilated::kernels::cpu

// Copies rows between a [batch, seq_len, heads, head_dim] tensor and the tiles' panels.
#pragma once

#include "kernels/attention.h"
#include "kernels/cpu/half.h"
#include "kernels/cpu/simd.h"

namespace dilated::kernels::cpu::DILATED_ISA {

/// Converts `count` rows, row_stride elements apart, times factor, to consecutive rows of head_dim
/// numbers.
template <typename Element, typename T>
inline void gather_rows(T* __restrict to, const Element* __restrict from, int64_t row_stride,
                        int count, int64_t head_dim, T factor) {
  for (int i = 0; i < count; ++i, from += row_stride, to += head_dim) {
    for (int64_t d = 0; d < head_dim; ++d) {
      to[d] = widen(from[d]) * factor;
    }
  }
}

/// The first `vectors` vectors of each of `count` rows of a panel <- 0: lanes without rows must be
/// finite.
template <typename T>
inline void clear_vectors(T* panel, int64_t count, int vectors) {
  for (int64_t row = 0; row < count; ++row) {
    for (int v = 0; v < vectors; ++v) {
      store(panel + row * kPanelRows + v * kLanes<T>, Vector<T>{});
    }
  }
}

/// Column `lane` of a [head_dim][kPanelRows] panel <- row * factor.
template <typename Element, typename T>
inline void pack_lane(T* __restrict panel, int lane, const Element* __restrict row,
                      int64_t head_dim, T factor) {
  for (int64_t d = 0; d < head_dim; ++d) {
    panel[d * kPanelRows + lane] = widen(row[d]) * factor;
  }
}

/// Row <- column `lane` of a [head_dim][kPanelRows] panel * factor.
template <typename Element, typename T>
inline void unpack_lane(Element* __restrict row, const T* __restrict panel, int lane,
                        int64_t head_dim, T factor) {
  for (int64_t d = 0; d < head_dim; ++d) {
    narrow(panel[d * kPanelRows + lane] * factor, row[d]);
  }
}

/// The same, plus other * other_factor.
template <typename Element, typename T>
inline void unpack_lane(Element* __restrict row, const T* __restrict panel, int lane,
                        int64_t head_dim, T factor, const T* __restrict other, T other_factor) {
  for (int64_t d = 0; d < head_dim; ++d) {
    narrow(panel[d * kPanelRows + lane] * factor + other[d] * other_factor, row[d]);
  }
}

}  // namespace dilated::kernels::cpu::DILATED_ISA

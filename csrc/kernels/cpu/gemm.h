// The one matrix product of the CPU kernels: C[m, n] (+)= sum_k A(m, k) * B[k, n].
//
// A is read as broadcast scalars and may have any strides (so it is never packed); B's and C's rows
// are contiguous vectors. A register block of kBlockRows x kBlockVectors accumulators stays in
// registers for the whole of k:
//
//            B[k, n]   b0   b1   b2   b3          (vectors)
//   A(m, k)   a0       +=   +=   +=   +=   C[m, n]
//             a1       +=   +=   +=   +=
//             ...                               6 rows
#pragma once

#include "kernels/cpu/simd.h"

namespace dilated::kernels::cpu::DILATED_ISA {

inline constexpr int kBlockRows = 6;

/// Element strides of A: A(m, k) = data[m * row + k * column].
template <typename T>
struct Scalars {
  const T* data;
  int64_t row, column;
};

/// A row-major matrix.
template <typename T>
struct Panel {
  T* data;
  int64_t stride;
};

template <typename T, int kRows, int kVectors>
[[gnu::always_inline]] inline void gemm_block(int64_t depth, const T* a, int64_t a_row,
                                              int64_t a_column, const T* b, int64_t b_stride, T* c,
                                              int64_t c_stride, bool accumulate) {
  Vector<T> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = accumulate ? load(c + i * c_stride + j * kLanes<T>) : Vector<T>{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> row[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      row[j] = load(b + j * kLanes<T>);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const T scalar = a[i * a_row];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        sum[i][j] += scalar * row[j];
      }
    }
    a += a_column;
    b += b_stride;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      store(c + i * c_stride + j * kLanes<T>, sum[i][j]);
    }
  }
}

/// All rows of one column block.
template <typename T, int kVectors>
[[gnu::noinline]] void gemm_columns(int rows, int64_t depth, Scalars<T> a, const T* b,
                                    int64_t b_stride, T* c, int64_t c_stride, bool accumulate) {
  const auto block = [&]<int kRows>(int i) {
    gemm_block<T, kRows, kVectors>(depth, a.data + i * a.row, a.row, a.column, b, b_stride,
                                   c + i * c_stride, c_stride, accumulate);
  };
  int i = 0;
  for (; i + kBlockRows <= rows; i += kBlockRows) {
    block.template operator()<kBlockRows>(i);
  }
  const int rest = rows - i;
  if (rest & 4) {
    block.template operator()<4>(i);
    i += 4;
  }
  if (rest & 2) {
    block.template operator()<2>(i);
    i += 2;
  }
  if (rest & 1) {
    block.template operator()<1>(i);
  }
}

/// C[0..rows, 0..vectors * kLanes) (+)= A * B. Rows of B and C must be readable to the end of the
/// last vector.
template <typename T>
void gemm(int rows, int vectors, int64_t depth, Scalars<T> a, Panel<const T> b, Panel<T> c,
          bool accumulate) {
  for (int j = 0; j < vectors; j += kBlockVectors) {
    const T* b_columns = b.data + j * kLanes<T>;
    T* c_columns = c.data + j * kLanes<T>;
    const auto run = [&]<int kVectors>() {
      gemm_columns<T, kVectors>(rows, depth, a, b_columns, b.stride, c_columns, c.stride,
                                accumulate);
    };
    switch (vectors - j) {
      case 1:
        run.template operator()<1>();
        break;
      case 2:
        run.template operator()<2>();
        break;
      case 3:
        run.template operator()<(kBlockVectors < 3 ? kBlockVectors : 3)>();
        break;
      default:
        run.template operator()<kBlockVectors>();
    }
  }
}

}  // namespace dilated::kernels::cpu::DILATED_ISA

// Vectors of the instruction set that the including file is compiled for, and exp on them.
//
// GCC and Clang vector extensions, so that one source serves SSE2, AVX2, AVX-512 and NEON.
// Everything here lives in an inner namespace named by DILATED_ISA: no function compiled for a
// newer machine may be linked into older code.
#pragma once

#include <cstdint>

#ifndef DILATED_ISA
#error "DILATED_ISA must name the inner namespace: baseline, avx2 or avx512"
#endif

namespace dilated::kernels::cpu::DILATED_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kBlockVectors = 4;  // columns of a register block, in vectors
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kBlockVectors = 2;
#else
inline constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
inline constexpr int kBlockVectors = 4;
#else
inline constexpr int kBlockVectors = 2;
#endif
#endif

/// Rows of a panel: the rows (queries forward, keys backward) are vector lanes, so softmax never
/// reduces across lanes.
inline constexpr int kPanelRows = 64;

inline constexpr double kLog2E = 1.4426950408889634074;

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  using Int = int32_t;
  static constexpr float kRound =
      0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  static constexpr int kMantissa = 23, kBias = 127;
  // 2^x = sum c_j x^j on [-1/2, 1/2], near-minimax (Chebyshev interpolation): relative error 1e-8
  // before rounding.
  static constexpr float kExp2[] = {0x1p+0f,        0x1.62e43p-1f,  0x1.ebfbep-3f, 0x1.c6aeccp-5f,
                                    0x1.3b2a1cp-7f, 0x1.5f48cp-10f, 0x1.444p-13f};
};

template <>
struct Simd<double> {
  using Int = int64_t;
  static constexpr double kRound = 0x1.8p52;
  static constexpr int kMantissa = 52, kBias = 1023;
  // As above: relative error 5e-18 before rounding.
  static constexpr double kExp2[] = {0x1p+0,
                                     0x1.62e42fefa39efp-1,
                                     0x1.ebfbdff82c5aep-3,
                                     0x1.c6b08d704a0c6p-5,
                                     0x1.3b2ab6fb9f1a5p-7,
                                     0x1.5d87fe78a3f9cp-10,
                                     0x1.430913112c61bp-13,
                                     0x1.ffcbfc6da6ed1p-17,
                                     0x1.62bfc2c86d7p-20,
                                     0x1.b524ebd13a55fp-24,
                                     0x1.e6228acd1c6e5p-28,
                                     0x1.e9ec1fcb69a7fp-32};
};

template <typename T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kVectorBytes)));
  typedef typename Simd<T>::Int Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Hash __attribute__((vector_size(kLanes<T> * 4)));
};
template <typename T>
using Vector = typename VectorOf<T>::Type;
template <typename T>
using IntVector = typename VectorOf<T>::Int;
template <typename T>
using HashVector = typename VectorOf<T>::Hash;

template <typename V, typename T>
[[gnu::always_inline]] inline V load_as(const T* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <typename T>
[[gnu::always_inline]] inline Vector<T> load(const T* from) {
  return load_as<Vector<T>>(from);
}

template <typename T, typename V>
[[gnu::always_inline]] inline void store(T* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

template <typename T>
[[gnu::always_inline]] inline Vector<T> maximum(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

/// e^x for x <= 0; 0 where that is below the smallest normal number; NaN gives NaN.
template <typename T>
[[gnu::always_inline]] inline Vector<T> exp(Vector<T> x) {
  using S = Simd<T>;
  const Vector<T> binary = x * static_cast<T>(kLog2E);
  const Vector<T> shifted = binary + S::kRound;
  const Vector<T> fraction = binary - (shifted - S::kRound);
  constexpr int kDegree = sizeof(S::kExp2) / sizeof(T) - 1;
  Vector<T> power = Vector<T>{} + S::kExp2[kDegree];
#pragma GCC unroll 16
  for (int j = kDegree - 1; j >= 0; --j) {
    power = power * fraction + S::kExp2[j];
  }
  // The low bits of `shifted` hold the integer part; adding the bias makes them an exponent.
  const IntVector<T> exponent = (reinterpret_cast<IntVector<T>>(shifted) + S::kBias)
                                << S::kMantissa;
  power *= reinterpret_cast<Vector<T>>(exponent);
  return binary < Vector<T>{} - (S::kBias - 1) ? Vector<T>{} : power;
}

/// dropout_keeps() of dropout.h from what it mixes, row key ^ key position * constant; each lane
/// all bits or none.
template <typename T>
[[gnu::always_inline]] inline IntVector<T> keep_mask(HashVector<T> x, uint32_t threshold) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  x = x ^ (x >> 16);
  const auto keeps = x >= (HashVector<T>{} + threshold);
  return __builtin_convertvector(keeps, IntVector<T>);
}

}  // namespace dilated::kernels::cpu::DILATED_ISA

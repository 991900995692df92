// Stored types and their conversion to and from the type of the arithmetic.
//
// Integer arithmetic that compilers vectorise; rounding is to nearest even. In the includer's inner
// namespace (see simd.h), `baseline` by default, so that code for one instruction set stays there.
#pragma once

#include <cstdint>

#ifndef DILATED_ISA
#define DILATED_ISA baseline
#endif

namespace dilated::kernels::cpu::DILATED_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

/// What a stored type is computed in.
template <typename Element>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <typename Element>
using Compute = typename ComputeOf<Element>::Type;

[[gnu::always_inline]] inline float widen(float value) { return value; }
[[gnu::always_inline]] inline double widen(double value) { return value; }
[[gnu::always_inline]] inline float widen(BFloat16 value) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16);
}
[[gnu::always_inline]] inline float widen(Half value) {
  constexpr uint32_t kRebias = uint32_t{127 - 15} << 23;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t special =
      magnitude >= 0x7c00u ? kRebias : 0;  // inf and NaN keep an exponent of all ones
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const uint32_t normal = (magnitude << 13) + kRebias + special;
  const uint32_t bits = magnitude < 0x400u ? __builtin_bit_cast(uint32_t, subnormal) : normal;
  return __builtin_bit_cast(float, bits | (value.bits & 0x8000u) << 16);
}

[[gnu::always_inline]] inline void narrow(float value, float& to) { to = value; }
[[gnu::always_inline]] inline void narrow(double value, double& to) { to = value; }
[[gnu::always_inline]] inline void narrow(float value, BFloat16& to) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  const uint32_t quiet_nan = bits >> 16 | 0x40u;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}
[[gnu::always_inline]] inline void narrow(float value, Half& to) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal =
      (magnitude + 0xfffu + (magnitude >> 13 & 1) - (uint32_t{127 - 15} << 23)) >> 13;
  // Adding 1/2 leaves a multiple of 2^-24, rounded by the hardware, in the low bits.
  const uint32_t subnormal =
      __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

}  // namespace dilated::kernels::cpu::DILATED_ISA

// bfloat16 and IEEE half as storage types, with exact conversions for one value at a time. The
// vector conversions are in cpu/simd.h.
#pragma once
#include <cstdint>
#include <cstring>

namespace pyllm {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

namespace half_detail {
static inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
static inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
}  // namespace half_detail

static inline float to_float(float x) { return x; }
static inline float to_float(int8_t x) { return x; }
static inline float to_float(bf16 x) { return half_detail::float_of(uint32_t{x.bits} << 16); }
static inline float to_float(f16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00) return half_detail::float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Multiplying by 2^112 moves the exponent, and makes subnormals normal on the way.
  const float value = half_detail::float_of(rest << 13) * 0x1p112f;
  return half_detail::float_of(half_detail::bits_of(value) | sign);
}

// To nearest, ties to even, as torch rounds.
template <class T>
static inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = half_detail::bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(u >> 16 | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const uint32_t u = half_detail::bits_of(x), sign = u >> 16 & 0x8000u, rest = u & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};  // overflows to inf
  if (rest < 0x38800000u) {  // subnormal: let the adder round at the right bit
    const float shifted = half_detail::float_of(rest) + 0.5f;
    return {static_cast<uint16_t>(sign | (half_detail::bits_of(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = rest + 0xfffu + (rest >> 13 & 1) - 0x38000000u;
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}

}  // namespace pyllm

// Arithmetic and number formats.
#pragma once
#include "cuda/ptx.cuh"

namespace pyllm::cuda {

// 2^x to about 2 ulp; subnormal results become zero.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef PYLLM_EMULATOR
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ float tanh_approx(float x) {
#ifdef PYLLM_EMULATOR
  return std::tanh(x);
#else
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Any function of three bits: Table is f(0xf0, 0xcc, 0xaa).
template <int Table>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#ifdef PYLLM_EMULATOR
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i)
    if (Table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
#else
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(Table));
  return result;
#endif
}

// --- number formats ---

__device__ __forceinline__ float float_of(float x) { return x; }
__device__ __forceinline__ float float_of(bf16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float float_of(f16 x) {
#ifdef PYLLM_EMULATOR
  return to_float(x);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

// To nearest, ties to even.
template <class T>
__device__ __forceinline__ T round_to(float x) {
#ifdef PYLLM_EMULATOR
  return from_float<T>(x);
#else
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    T y;
    if constexpr (std::is_same_v<T, f16>)
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    else
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
  }
#endif
}

// Two halves in a register, as mma takes them: `lo` in the low bits.
template <class T>
__device__ __forceinline__ uint32_t pack(float lo, float hi) {
#ifdef PYLLM_EMULATOR
  return from_float<T>(lo).bits | static_cast<uint32_t>(from_float<T>(hi).bits) << 16;
#else
  uint32_t r;
  if constexpr (std::is_same_v<T, f16>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#endif
}
template <class T>
__device__ __forceinline__ Vec<float, 2> unpack(uint32_t x) {
  return {float_of(T{static_cast<uint16_t>(x)}), float_of(T{static_cast<uint16_t>(x >> 16)})};
}

// Arithmetic on pairs of halves: a b + c, each rounded once.
template <class T>
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
#ifdef PYLLM_EMULATOR
  const auto x = unpack<T>(a), y = unpack<T>(b), z = unpack<T>(c);
  // Products of halves are exact in double, and so is the sum but for cases rounding hides.
  return pack<T>(static_cast<float>(double{x[0]} * y[0] + z[0]),
                 static_cast<float>(double{x[1]} * y[1] + z[1]));
#else
  uint32_t r;
  if constexpr (std::is_same_v<T, f16>)
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
#endif
}
__device__ __forceinline__ uint32_t sub2_f16(uint32_t a, uint32_t b) {
#ifdef PYLLM_EMULATOR
  const auto x = unpack<f16>(a), y = unpack<f16>(b);
  return pack<f16>(x[0] - y[0], x[1] - y[1]);
#else
  uint32_t r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#endif
}

// fp8 e4m3 (4 exponent bits, bias 7, no infinity, 0x7f is NaN) in integer arithmetic, so that it
// also runs before sm_89.
__device__ __forceinline__ float float_of_e4m3(uint8_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x80) << 24, rest = x & 0x7f;
  if (rest == 0x7f) return __uint_as_float(sign | 0x7fc00000u);
  // The bits as those of a float with a small exponent, times 2^120.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 20) * 0x1p120f));
}
// Two of them, in the low bits of x, as two f16.
__device__ __forceinline__ uint32_t widen_e4m3(uint32_t x) {
#if defined(PYLLM_EMULATOR) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890)
  return pack<f16>(float_of_e4m3(static_cast<uint8_t>(x)),
                   float_of_e4m3(static_cast<uint8_t>(x >> 8)));
#else
  uint32_t r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(static_cast<uint16_t>(x)));
  return r;
#endif
}
// To nearest, ties to even; beyond 448 saturates.
__device__ __forceinline__ uint8_t round_to_e4m3(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7f);
  if (rest >= 0x43e00000u) return static_cast<uint8_t>(sign | 0x7e);  // 448 and beyond
  if (rest < 0x3c800000u)  // below 2^-6, subnormal: let the adder round at 2^-9
    return static_cast<uint8_t>(sign |
                                (__float_as_uint(__uint_as_float(rest) + 0x1p14f) - 0x46800000u));
  const uint32_t rounded = rest + 0x7ffffu + (rest >> 20 & 1) - 0x3c000000u;
  return static_cast<uint8_t>(sign | rounded >> 20);
}

// Four values as round_to_e4m3 rounds them, the first in the low byte.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
#if !defined(PYLLM_EMULATOR) && __CUDA_ARCH__ >= 890
  uint16_t lo, hi;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(lo) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(hi) : "f"(d), "f"(c));
  return lo | static_cast<uint32_t>(hi) << 16;
#else
  return round_to_e4m3(a) | round_to_e4m3(b) << 8 | round_to_e4m3(c) << 16 |
         static_cast<uint32_t>(round_to_e4m3(d)) << 24;
#endif
}

}  // namespace pyllm::cuda

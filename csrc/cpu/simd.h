// Sixteen floats at a time, on every instruction set: one zmm register with AVX-512, two ymm with
// AVX2, sixteen plain floats elsewhere (the compiler vectorizes those for SSE2 or NEON). A kernel
// is written once against this and compiled once per instruction set, in a namespace of its own:
//
//   #include "cpu/simd.h"
//   namespace pyllm::PYLLM_ISA { ... }
//
// Everything here has internal linkage. A function with external linkage compiled for AVX-512 could
// be merged by the linker with its twin from a baseline file, and would crash an older processor;
// for the same reason kernels use no std:: templates.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/half.h"
#include "core/tensor.h"

#if !defined(PYLLM_ISA)
#error "compile this once per instruction set, with -DPYLLM_ISA=baseline|avx2|avx512"
#endif
#if defined(PYLLM_ISA_AVX512) || defined(PYLLM_ISA_AVX2)
#include <immintrin.h>
#endif

#define PYLLM_INLINE static inline __attribute__((always_inline))

namespace pyllm::PYLLM_ISA {
namespace {

constexpr int kLanes = 16;
constexpr float kInf = std::numeric_limits<float>::infinity();

#if defined(PYLLM_ISA_AVX512)

struct f32x16 {
  __m512 v;
};
PYLLM_INLINE f32x16 splat(float x) { return {_mm512_set1_ps(x)}; }
PYLLM_INLINE f32x16 operator+(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
PYLLM_INLINE f32x16 operator-(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
PYLLM_INLINE f32x16 operator*(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
PYLLM_INLINE f32x16 operator/(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
// a * b + c, rounded once
PYLLM_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// If either is NaN the result is b, so max(nan, b) == b and max(a, nan) is nan.
PYLLM_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
PYLLM_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
PYLLM_INLINE f32x16 round(f32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
PYLLM_INLINE f32x16 abs(f32x16 a) { return {_mm512_abs_ps(a.v)}; }
// a < b ? x : y, lane by lane
PYLLM_INLINE f32x16 select_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
// x * 2^n, for integral n in [-126, 127]; here for any
PYLLM_INLINE f32x16 scale_by_power(f32x16 x, f32x16 n) { return {_mm512_scalef_ps(x.v, n.v)}; }
PYLLM_INLINE float reduce_add(f32x16 a) { return _mm512_reduce_add_ps(a.v); }
PYLLM_INLINE float reduce_max(f32x16 a) { return _mm512_reduce_max_ps(a.v); }

PYLLM_INLINE __m256i bits(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
PYLLM_INLINE f32x16 widen(__m256i h, bf16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
PYLLM_INLINE f32x16 widen(__m256i h, f16) { return {_mm512_cvtph_ps(h)}; }
PYLLM_INLINE f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
PYLLM_INLINE f32x16 load(const bf16* p) { return widen(bits(p), bf16{}); }
PYLLM_INLINE f32x16 load(const f16* p) { return widen(bits(p), f16{}); }
PYLLM_INLINE f32x16 load(const int8_t* p) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b))};
}
PYLLM_INLINE __m256i narrow(f32x16 a, bf16) {
  // The instruction that rounds takes subnormals for zeros.
  constexpr int kSubnormal = 0x20;
  if (__builtin_expect(!_mm512_fpclass_ps_mask(a.v, kSubnormal), 1)) {
    const __m256bh h = _mm512_cvtneps_pbh(a.v);
    __m256i bits;
    std::memcpy(&bits, &h, sizeof(bits));
    return bits;
  }
  const __m512i u = _mm512_castps_si512(a.v), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), one);
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
PYLLM_INLINE __m256i narrow(f32x16 a, f16) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
}
PYLLM_INLINE void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
template <class T>
PYLLM_INLINE void store(T* p, f32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}
// Whole numbers in [-128, 127].
PYLLM_INLINE void store_int8(int8_t* p, f32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

// rows[i] lane j becomes rows[j] lane i.
PYLLM_INLINE void transpose(f32x16 (&rows)[16]) {
  __m512 t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  // u[4 i + j] holds in its quarter q the lanes 4 q + j of rows 4 i to 4 i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    rows[j].v = _mm512_shuffle_f32x4(a, c, 0x88);
    rows[4 + j].v = _mm512_shuffle_f32x4(b, d, 0x88);
    rows[8 + j].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    rows[12 + j].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

#elif defined(PYLLM_ISA_AVX2)

struct f32x16 {
  __m256 lo, hi;
};
PYLLM_INLINE f32x16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
#define PYLLM_BINARY(name, intrinsic)                      \
  PYLLM_INLINE f32x16 name(f32x16 a, f32x16 b) {           \
    return {intrinsic(a.lo, b.lo), intrinsic(a.hi, b.hi)}; \
  }
PYLLM_BINARY(operator+, _mm256_add_ps)
PYLLM_BINARY(operator-, _mm256_sub_ps)
PYLLM_BINARY(operator*, _mm256_mul_ps)
PYLLM_BINARY(operator/, _mm256_div_ps)
PYLLM_BINARY(max, _mm256_max_ps)
PYLLM_BINARY(min, _mm256_min_ps)
#undef PYLLM_BINARY
PYLLM_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
PYLLM_INLINE f32x16 round(f32x16 a) {
  return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
PYLLM_INLINE f32x16 abs(f32x16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
PYLLM_INLINE f32x16 select_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
PYLLM_INLINE __m256 power_of_two(__m256 n) {
  const __m256i e = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(e, _mm256_set1_epi32(0x3f800000)));
}
PYLLM_INLINE f32x16 scale_by_power(f32x16 x, f32x16 n) {
  return {_mm256_mul_ps(x.lo, power_of_two(n.lo)), _mm256_mul_ps(x.hi, power_of_two(n.hi))};
}
PYLLM_INLINE float reduce_add(f32x16 a) {
  const __m256 s = _mm256_add_ps(a.lo, a.hi);
  __m128 r = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  r = _mm_add_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}
PYLLM_INLINE float reduce_max(f32x16 a) {
  const __m256 s = _mm256_max_ps(a.lo, a.hi);
  __m128 r = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  r = _mm_max_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
}

PYLLM_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PYLLM_INLINE __m256 load8(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
PYLLM_INLINE __m256 load8(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
PYLLM_INLINE __m256 load8(const int8_t* p) {
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b));
}
PYLLM_INLINE f32x16 load(const int8_t* p) { return {load8(p), load8(p + 8)}; }
PYLLM_INLINE f32x16 load(const bf16* p) { return {load8(p), load8(p + 8)}; }
PYLLM_INLINE f32x16 load(const f16* p) { return {load8(p), load8(p + 8)}; }
PYLLM_INLINE void store(float* p, f32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
PYLLM_INLINE void store8(bf16* p, __m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i h = _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
PYLLM_INLINE void store(bf16* p, f32x16 a) {
  store8(p, a.lo);
  store8(p + 8, a.hi);
}
PYLLM_INLINE void store(f16* p, f32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8),
                   _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
PYLLM_INLINE void store_int8(int8_t* p, f32x16 a) {
  const __m256i words = _mm256_permute4x64_epi64(
      _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)), 0xd8);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

PYLLM_INLINE void transpose8(__m256 (&r)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    r[4 + j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
}
PYLLM_INLINE void transpose(f32x16 (&rows)[16]) {
  __m256 a[8], b[8], c[8], d[8];  // the quarters
  for (int i = 0; i < 8; ++i) {
    a[i] = rows[i].lo, b[i] = rows[i].hi;
    c[i] = rows[8 + i].lo, d[i] = rows[8 + i].hi;
  }
  transpose8(a), transpose8(b), transpose8(c), transpose8(d);
  for (int i = 0; i < 8; ++i) rows[i] = {a[i], c[i]}, rows[8 + i] = {b[i], d[i]};
}

#else

struct f32x16 {
  float v[kLanes];
};
#define PYLLM_LANES(expression)                           \
  f32x16 r;                                               \
  for (int i = 0; i < kLanes; ++i) r.v[i] = (expression); \
  return r
PYLLM_INLINE f32x16 splat(float x) { PYLLM_LANES(x); }
PYLLM_INLINE f32x16 operator+(f32x16 a, f32x16 b) { PYLLM_LANES(a.v[i] + b.v[i]); }
PYLLM_INLINE f32x16 operator-(f32x16 a, f32x16 b) { PYLLM_LANES(a.v[i] - b.v[i]); }
PYLLM_INLINE f32x16 operator*(f32x16 a, f32x16 b) { PYLLM_LANES(a.v[i] * b.v[i]); }
PYLLM_INLINE f32x16 operator/(f32x16 a, f32x16 b) { PYLLM_LANES(a.v[i] / b.v[i]); }
// Rounded twice where the target has no fused instruction; the same everywhere on that target.
PYLLM_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { PYLLM_LANES(a.v[i] * b.v[i] + c.v[i]); }
PYLLM_INLINE f32x16 max(f32x16 a, f32x16 b) { PYLLM_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
PYLLM_INLINE f32x16 min(f32x16 a, f32x16 b) { PYLLM_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
PYLLM_INLINE f32x16 round(f32x16 a) {
  // Adding 1.5 * 2^23 leaves no bits for a fraction. For |a| < 2^22, which is all that we need.
  PYLLM_LANES((a.v[i] + 12582912.0f) - 12582912.0f);
}
PYLLM_INLINE f32x16 abs(f32x16 a) { PYLLM_LANES(__builtin_fabsf(a.v[i])); }
PYLLM_INLINE f32x16 select_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  PYLLM_LANES(a.v[i] < b.v[i] ? x.v[i] : y.v[i]);
}
PYLLM_INLINE f32x16 scale_by_power(f32x16 x, f32x16 n) {
  PYLLM_LANES(x.v[i] *
              half_detail::float_of(static_cast<uint32_t>(static_cast<int>(n.v[i]) + 127) << 23));
}
PYLLM_INLINE float reduce_add(f32x16 a) {
  for (int n = kLanes / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) a.v[i] += a.v[i + n];
  return a.v[0];
}
PYLLM_INLINE float reduce_max(f32x16 a) {
  for (int n = kLanes / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) a.v[i] = a.v[i] > a.v[i + n] ? a.v[i] : a.v[i + n];
  return a.v[0];
}
PYLLM_INLINE void transpose(f32x16 (&rows)[16]) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float t = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = t;
    }
}
template <class T>
PYLLM_INLINE f32x16 load(const T* p) {
  PYLLM_LANES(to_float(p[i]));
}
template <class T>
PYLLM_INLINE void store(T* p, f32x16 a) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(a.v[i]);
}
PYLLM_INLINE void store_int8(int8_t* p, f32x16 a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
#undef PYLLM_LANES

#endif

PYLLM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYLLM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

PYLLM_INLINE f32x16 zero() { return splat(0.0f); }

// fma without a second rounding on any target: in double where there is no instruction.
PYLLM_INLINE f32x16 fma_rounded_once(f32x16 a, f32x16 b, f32x16 c) {
#if defined(PYLLM_ISA_AVX512) || defined(PYLLM_ISA_AVX2)
  return fma(a, b, c);
#else
  f32x16 r;
  for (int i = 0; i < kLanes; ++i)
    r.v[i] = static_cast<float>(static_cast<double>(a.v[i]) * b.v[i] + c.v[i]);
  return r;
#endif
}

// 1 / x to about 1 ulp, for x that is normal and whose reciprocal is.
PYLLM_INLINE f32x16 reciprocal(f32x16 x) {
#if defined(PYLLM_ISA_AVX512)
  // 14 bits, and a step of Newton's: a third of a division's time.
  const f32x16 y = {_mm512_rcp14_ps(x.v)};
  return y * fma(zero() - x, y, splat(2.0f));
#else
  return splat(1.0f) / x;
#endif
}

// The first n of 16 lanes; the others are `fill` and their memory is not touched.
#if defined(PYLLM_ISA_AVX512)
PYLLM_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1 << n) - 1); }
template <class T>
PYLLM_INLINE f32x16 load_n(const T* p, int64_t n, float fill = 0.0f) {
  if (n >= kLanes) return load(p);
  f32x16 a;
  if constexpr (std::is_same_v<T, float>)
    a.v = _mm512_maskz_loadu_ps(first_lanes(n), p);
  else if constexpr (std::is_same_v<T, int8_t>)
    a.v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)));
  else
    a = widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), T{});
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first_lanes(n), a.v)};
}
template <class T>
PYLLM_INLINE void store_n(T* p, f32x16 a, int64_t n) {
  if (n >= kLanes) return store(p, a);
  if constexpr (std::is_same_v<T, float>)
    _mm512_mask_storeu_ps(p, first_lanes(n), a.v);
  else
    _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(a, T{}));
}
#else
template <class T>
PYLLM_INLINE f32x16 load_n(const T* p, int64_t n, float fill = 0.0f) {
  if (n >= kLanes) return load(p);
  alignas(64) float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return load(lanes);
}
template <class T>
PYLLM_INLINE void store_n(T* p, f32x16 a, int64_t n) {
  if (n >= kLanes) return store(p, a);
  alignas(64) float lanes[kLanes];
  store(lanes, a);
  for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(lanes[i]);
}
#endif

// ln 2 in two parts (Cody and Waite): whole numbers of 14 bits times the first are exact.
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;

// e^r - 1 for r = x - n ln 2 in [-ln2/2, ln2/2]: a polynomial of degree 6.
PYLLM_INLINE f32x16 expm1_reduced(f32x16 x, f32x16 n) {
  const f32x16 r = fma(n, splat(-kLn2Low), fma(n, splat(-kLn2High), x));
  f32x16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  return fma(p * r, r, r);
}

// e^x to about 1 ulp; exp(0) is exactly 1, exp(-inf) exactly 0, NaN stays NaN.
PYLLM_INLINE f32x16 exp(f32x16 x) {
#if defined(PYLLM_ISA_AVX512)
  // The scaling instruction overflows and underflows as it should, by itself.
  const f32x16 limited = max(splat(-104.0f), min(splat(89.0f), x));  // order keeps NaN
  const f32x16 power = round(limited * splat(1.44269504088896341f));
  return scale_by_power(expm1_reduced(limited, power) + splat(1.0f), power);
#else
  const f32x16 clamped = max(splat(-87.0f), min(splat(88.72f), x));  // order keeps NaN
  const f32x16 n = round(clamped * splat(1.44269504088896341f));
  const f32x16 p = expm1_reduced(clamped, n) + splat(1.0f);
  // 2^128 has no float: multiply by 2^(n-1) and then by 2.
  const f32x16 y = scale_by_power(p, n - splat(1.0f)) * splat(2.0f);
  f32x16 out = select_less(x, splat(-87.0f), zero(), y);
  return select_less(splat(88.72f), x, splat(kInf), out);
#endif
}

// 2^x to about 1 ulp, for x <= 127; 0 below -126, exactly 1 at 0, and NaN stays NaN. The
// coefficients are those of Cephes' exp2f.
PYLLM_INLINE f32x16 exp2(f32x16 x) {
  const f32x16 clamped = max(splat(-126.0f), x);  // order keeps NaN
  const f32x16 n = round(clamped), r = clamped - n;
  f32x16 p = splat(1.535336188319500e-4f);
  p = fma(p, r, splat(1.339887440266574e-3f));
  p = fma(p, r, splat(9.618437357674640e-3f));
  p = fma(p, r, splat(5.550332471162809e-2f));
  p = fma(p, r, splat(2.402264791363012e-1f));
  p = fma(p, r, splat(6.931472028550421e-1f));
  p = fma(p, r, splat(1.0f));
  return select_less(x, splat(-126.0f), zero(), scale_by_power(p, n));
}

// tanh to a few ulps, through e^y - 1 with y = -2|x|, which near 0 does not cancel.
PYLLM_INLINE f32x16 tanh(f32x16 x) {
  const f32x16 y = max(splat(-40.0f), abs(x) * splat(-2.0f));  // order keeps NaN
  const f32x16 n = round(y * splat(1.44269504088896341f));
  const f32x16 p = expm1_reduced(y, n);
  const f32x16 power = scale_by_power(splat(1.0f), n);
  const f32x16 e = fma(p, power, power - splat(1.0f));
  const f32x16 t = e / (e + splat(2.0f));  // -tanh |x|
  return select_less(x, zero(), t, zero() - t);
}

// Calls f with a null pointer of the storage type that `dtype` names, one of kFloats.
template <class F>
PYLLM_INLINE void dispatch_float(DType dtype, F f) {
  switch (dtype) {
    case DType::F32: return f(static_cast<float*>(nullptr));
    case DType::BF16: return f(static_cast<bf16*>(nullptr));
    default: return f(static_cast<f16*>(nullptr));
  }
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA

// The sums of several vectors in one: additions of whole vectors after shuffles, where a
// reduce_add each would waste most lanes of every addition.
#pragma once
#include "cpu/row.h"

namespace pyllm::PYLLM_ISA {
namespace {

// Lane i is reduce_add(rows[i]), the same additions in the same order, for i < N <= 16; the lanes
// behind repeat something.
#if defined(PYLLM_ISA_AVX512)

PYLLM_INLINE __m512 add_halves(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
PYLLM_INLINE __m512 add_quarters(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
PYLLM_INLINE __m512 add_pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
PYLLM_INLINE __m512 add_lanes(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}
template <int N>
PYLLM_INLINE f32x16 reduce_add_rows(const f32x16* rows) {
  const auto row = [rows](int i) PYLLM_LAMBDA { return rows[i < N ? i : N - 1].v; };
  __m512 q[4];  // q[i] has in its quarter j four sums of row 4 j + i
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    q[i] = add_quarters(add_halves(row(i), row(i + 4)), add_halves(row(i + 8), row(i + 12)));
  return {add_lanes(add_pairs(q[0], q[1]), add_pairs(q[2], q[3]))};
}

#elif defined(PYLLM_ISA_AVX2)

PYLLM_INLINE __m256 add_quarters(__m256 a, __m256 b) {
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
PYLLM_INLINE __m256 add_pairs(__m256 a, __m256 b) {
  return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
}
PYLLM_INLINE __m256 add_lanes(__m256 a, __m256 b) {
  return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}
template <int N>
PYLLM_INLINE f32x16 reduce_add_rows(const f32x16* rows) {
  const auto half = [rows](int i) PYLLM_LAMBDA {
    const f32x16 row = rows[i < N ? i : N - 1];
    return _mm256_add_ps(row.lo, row.hi);
  };
  const auto sums = [half](int first) PYLLM_LAMBDA {
    __m256 q[4];  // q[i] has in its half j four sums of row first + 4 j + i
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) q[i] = add_quarters(half(first + i), half(first + i + 4));
    return add_lanes(add_pairs(q[0], q[1]), add_pairs(q[2], q[3]));
  };
  return {sums(0), sums(N > 8 ? 8 : 0)};
}

#else

template <int N>
PYLLM_INLINE f32x16 reduce_add_rows(const f32x16* rows) {
  f32x16 sums = zero();
  for (int i = 0; i < N; ++i) sums.v[i] = reduce_add(rows[i]);
  return sums;
}

#endif

}  // namespace
}  // namespace pyllm::PYLLM_ISA

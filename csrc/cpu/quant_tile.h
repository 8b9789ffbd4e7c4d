// The inner loop of quant_matmul: MR tokens times one panel of 16 rows, over all of K. Integer dot
// products are exact within a group; across groups every path does the same float operations for
// an output, in this order:
//
//   acc = fma(float(dot), d_w * d_x, acc); if there is a minimum: acc = fma(m_w, s_x, acc)
#pragma once
#include "core/quant_matrix.h"
#include "cpu/quantize_activation.h"
#include "cpu/simd.h"

namespace pyllm::PYLLM_ISA {
namespace {

// A QuantMatrix's format, known to the compiler.
template <int Bits, int GroupSize, bool Minimum>
struct Format {
  static constexpr int bits = Bits, group_size = GroupSize;
  static constexpr bool minimum = Minimum;
  static constexpr int offset = Minimum ? 0 : 1 << (Bits - 1);
  static constexpr int quads = GroupSize / 4;
  static constexpr int vectors = quads * Bits / 8;
  static constexpr int scale_bytes = Minimum ? 64 : 32;
  static constexpr int group_bytes = scale_bytes + 64 * vectors;
};

// Where a tile's sums go: sixteen floats a token, `stride` apart.
struct TileOutput {
  float* data;
  int64_t stride;
  float* row(int64_t t) const { return data + t * stride; }
};

// MR consecutive rows of quantized activations.
struct ActivationRows {
  const uint8_t* data;
  int64_t stride;  // bytes
  ActivationLayout layout;
};

PYLLM_INLINE int32_t word_at(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return word;
}
PYLLM_INLINE float float_at(const uint8_t* p) {
  float x;
  std::memcpy(&x, p, 4);
  return x;
}

#if defined(PYLLM_ISA_AVX512)

constexpr int kMaxTile = 12;
constexpr int kPrefetch = 2048;  // bytes ahead

// vpdpbusd multiplies the unsigned quants of four k of 16 rows by four int8 of a token, broadcast
// from memory. 12 integer and 12 float accumulators leave just enough registers for the weights.
template <class F, int MR>
void tile(const uint8_t* panel, ActivationRows x, TileOutput out) {
  const uint8_t* scale = x.data + x.layout.scale_at();
  const int64_t sum_at = 4 * x.layout.groups(), correction_at = 8 * x.layout.groups();
  const __m512i nibble = _mm512_set1_epi8(15);
  f32x16 acc[MR];
#pragma GCC unroll 12
  for (int t = 0; t < MR; ++t) acc[t] = zero();
  const uint8_t* q = x.data;
  for (int64_t g = x.layout.groups(); g > 0;
       --g, panel += F::group_bytes, q += F::group_size, scale += 4) {
    __m512i dot[MR];
    // For one token the processor's own prefetching is better (measured).
    if constexpr (MR >= 4)
#pragma GCC unroll 10
      for (int i = 0; i < F::group_bytes; i += 64) _mm_prefetch(panel + kPrefetch + i, _MM_HINT_T0);
#pragma GCC unroll 12
    for (int t = 0; t < MR; ++t) {
      if constexpr (F::offset == 0) {
        dot[t] = _mm512_setzero_si512();
      } else {
        dot[t] = _mm512_set1_epi32(word_at(scale + correction_at + t * x.stride));
        if constexpr (F::offset == 128) dot[t] = _mm512_slli_epi32(dot[t], 4);
      }
    }
    const uint8_t* quants = panel + F::scale_bytes;
#pragma GCC unroll 8
    for (int v = 0; v < F::vectors; ++v) {
      const __m512i w = _mm512_loadu_si512(quants + 64 * v);
      const __m512i low = F::bits == 4 ? _mm512_and_si512(w, nibble) : w;
#pragma GCC unroll 12
      for (int t = 0; t < MR; ++t)
        dot[t] =
            _mm512_dpbusd_epi32(dot[t], low, _mm512_set1_epi32(word_at(q + t * x.stride + 4 * v)));
      if constexpr (F::bits == 4) {
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);
#pragma GCC unroll 12
        for (int t = 0; t < MR; ++t)
          dot[t] = _mm512_dpbusd_epi32(
              dot[t], high,
              _mm512_set1_epi32(word_at(q + t * x.stride + 4 * v + F::group_size / 2)));
      }
    }
    const f32x16 d = load(reinterpret_cast<const f16*>(panel));
#pragma GCC unroll 12
    for (int t = 0; t < MR; ++t)
      acc[t] = fma({_mm512_cvtepi32_ps(dot[t])}, d * splat(float_at(scale + t * x.stride)), acc[t]);
    if constexpr (F::minimum) {
      const f32x16 m = load(reinterpret_cast<const f16*>(panel + 32));
#pragma GCC unroll 12
      for (int t = 0; t < MR; ++t)
        acc[t] = fma(m, splat(float_at(scale + sum_at + t * x.stride)), acc[t]);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < MR; ++t) store(out.row(t), acc[t]);
}

#elif defined(PYLLM_ISA_AVX2)

constexpr int kMaxTile = 4;

// Eight rows at a time, so that four tokens' accumulators stay in registers. vpmaddubsw multiplies
// unsigned by signed bytes and adds pairs in int16: for 4 bits a group of 32 fits (8 * 2 * 15 * 127
// < 2^15); for 8 bits the quants are made signed and their sign is moved to the activations
// (2 * 128 * 127 < 2^15), and every pair is widened at once.
template <class F, int MR>
PYLLM_INLINE void half_tile(const uint8_t* panel, ActivationRows x, int half, TileOutput out) {
  const uint8_t* scale = x.data + x.layout.scale_at();
  const int64_t sum_at = 4 * x.layout.groups(), correction_at = 8 * x.layout.groups();
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 acc[MR];
#pragma GCC unroll 4
  for (int t = 0; t < MR; ++t) acc[t] = _mm256_setzero_ps();
  const uint8_t* q = x.data;
  panel += 16 * half;
  for (int64_t g = x.layout.groups(); g > 0;
       --g, panel += F::group_bytes, q += F::group_size, scale += 4) {
    __m256i dot[MR];
#pragma GCC unroll 4
    for (int t = 0; t < MR; ++t) dot[t] = _mm256_setzero_si256();
    const uint8_t* quants = panel + F::scale_bytes + 16 * half;
#pragma GCC unroll 8
    for (int v = 0; v < F::vectors; ++v) {
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(quants + 64 * v));
      if constexpr (F::bits == 4) {
        const __m256i nibble = _mm256_set1_epi8(15);
        const __m256i low = _mm256_and_si256(w, nibble);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
#pragma GCC unroll 4
        for (int t = 0; t < MR; ++t) {
          const uint8_t* p = q + t * x.stride + 4 * v;
          dot[t] =
              _mm256_add_epi16(dot[t], _mm256_maddubs_epi16(low, _mm256_set1_epi32(word_at(p))));
          dot[t] = _mm256_add_epi16(
              dot[t],
              _mm256_maddubs_epi16(high, _mm256_set1_epi32(word_at(p + F::group_size / 2))));
        }
      } else {
        const __m256i s = _mm256_xor_si256(w, _mm256_set1_epi8(-128)),
                      magnitude = _mm256_abs_epi8(s);
#pragma GCC unroll 4
        for (int t = 0; t < MR; ++t) {
          const __m256i y = _mm256_set1_epi32(word_at(q + t * x.stride + 4 * v));
          const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(y, s));
          dot[t] = _mm256_add_epi32(dot[t], _mm256_madd_epi16(pairs, ones));
        }
      }
    }
    const __m256 d = load8(reinterpret_cast<const f16*>(panel));
#pragma GCC unroll 4
    for (int t = 0; t < MR; ++t) {
      if constexpr (F::bits == 4) dot[t] = _mm256_madd_epi16(dot[t], ones);
      // What is still to add is (offset removed so far - offset) * sum(q): -8, 0, or +128 times it.
      const __m256i c = _mm256_set1_epi32(word_at(scale + correction_at + t * x.stride));
      if constexpr (F::bits == 4 && F::offset != 0) dot[t] = _mm256_add_epi32(dot[t], c);
      if constexpr (F::bits == 8 && F::offset == 0)
        dot[t] = _mm256_sub_epi32(dot[t], _mm256_slli_epi32(c, 4));
      const __m256 d_x = _mm256_set1_ps(float_at(scale + t * x.stride));
      acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[t]), _mm256_mul_ps(d, d_x), acc[t]);
    }
    if constexpr (F::minimum) {
      const __m256 m = load8(reinterpret_cast<const f16*>(panel + 32));
#pragma GCC unroll 4
      for (int t = 0; t < MR; ++t)
        acc[t] =
            _mm256_fmadd_ps(m, _mm256_set1_ps(float_at(scale + sum_at + t * x.stride)), acc[t]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < MR; ++t) _mm256_storeu_ps(out.row(t) + 8 * half, acc[t]);
}

template <class F, int MR>
void tile(const uint8_t* panel, ActivationRows x, TileOutput out) {
  half_tile<F, MR>(panel, x, 0, out);
  half_tile<F, MR>(panel, x, 1, out);
}

#else

constexpr int kMaxTile = 4;

PYLLM_INLINE void add_quads(int32_t* dot, const uint8_t* w, int shift, int mask, const int8_t* x) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) dot[lane] += (w[4 * lane + i] >> shift & mask) * x[i];
}

template <class F, int MR>
void tile(const uint8_t* panel, ActivationRows x, TileOutput out) {
  const int64_t groups = x.layout.groups();
  for (int t = 0; t < MR; ++t) store(out.row(t), zero());
  for (int64_t g = 0; g < groups; ++g, panel += F::group_bytes) {
    const f32x16 d = load(reinterpret_cast<const f16*>(panel));
    for (int t = 0; t < MR; ++t) {
      const uint8_t* row = x.data + t * x.stride;
      const int8_t* q = reinterpret_cast<const int8_t*>(row) + g * F::group_size;
      const uint8_t* scale = row + x.layout.scale_at() + 4 * g;
      int32_t dot[kLanes];
      for (int i = 0; i < kLanes; ++i) dot[i] = word_at(scale + 8 * groups) * (F::offset / 8);
      for (int v = 0; v < F::vectors; ++v) {
        const uint8_t* w = panel + F::scale_bytes + 64 * v;
        add_quads(dot, w, 0, F::bits == 4 ? 15 : 255, q + 4 * v);
        if constexpr (F::bits == 4) add_quads(dot, w, 4, 15, q + 4 * v + F::group_size / 2);
      }
      f32x16 exact;
      for (int i = 0; i < kLanes; ++i) exact.v[i] = static_cast<float>(dot[i]);
      f32x16 acc = fma(exact, d * splat(float_at(scale)), load(out.row(t)));
      if constexpr (F::minimum)
        acc = fma(load(reinterpret_cast<const f16*>(panel + 32)),
                  splat(float_at(scale + 4 * groups)), acc);
      store(out.row(t), acc);
    }
  }
}

#endif

}  // namespace
}  // namespace pyllm::PYLLM_ISA

// Sixteen independent accumulators hide the latency of any multiply-add that we know (4 or 5
// cycles, two a cycle) and fit in the registers of AVX-512; of AVX2 six pairs do.
#include "cpu/limits.h"

#include "cpu/simd.h"

namespace pyllm::PYLLM_ISA {
namespace {

#if defined(PYLLM_ISA_AVX512)
constexpr int kAccumulators = 16;
#elif defined(PYLLM_ISA_AVX2)
constexpr int kAccumulators = 6;  // pairs of registers
#else
constexpr int kAccumulators = 1;
#endif

// Keeps the compiler from seeing through a loop that computes the same thing every time.
template <class T>
PYLLM_INLINE void opaque(T& x) {
  asm volatile("" : "+m"(x));
}

struct F32 {
  static constexpr int operations = 2 * kLanes;
  PYLLM_INLINE f32x16 step(f32x16 acc, f32x16 a) { return fma(a, a, acc); }
};

#if defined(PYLLM_ISA_AVX512)
struct Int8 {
  static constexpr int operations = 2 * 64;
  PYLLM_INLINE f32x16 step(f32x16 acc, f32x16 a) {
    const __m512i x = _mm512_castps_si512(a.v);
    return {_mm512_castsi512_ps(_mm512_dpbusd_epi32(_mm512_castps_si512(acc.v), x, x))};
  }
};
struct BF16 {
  static constexpr int operations = 2 * 32;
  PYLLM_INLINE f32x16 step(f32x16 acc, f32x16 a) {
    const __m512bh x = (__m512bh)a.v;
    return {_mm512_dpbf16_ps(acc.v, x, x)};
  }
};
#elif defined(PYLLM_ISA_AVX2)
struct Int8 {
  static constexpr int operations = 2 * 64;
  PYLLM_INLINE __m256 step(__m256 acc, __m256 a) {
    const __m256i x = _mm256_castps_si256(a);
    const __m256i sum = _mm256_add_epi16(_mm256_castps_si256(acc), _mm256_maddubs_epi16(x, x));
    return _mm256_castsi256_ps(sum);
  }
  PYLLM_INLINE f32x16 step(f32x16 acc, f32x16 a) {
    return {step(acc.lo, a.lo), step(acc.hi, a.hi)};
  }
};
#endif

template <class Kind>
void repeat(const PeakArithmeticArgs& args, int64_t chunk) {
  f32x16 a = splat(1e-9f), acc[kAccumulators];
  opaque(a);
#pragma GCC unroll 16
  for (int i = 0; i < kAccumulators; ++i) acc[i] = a;
  for (int64_t n = 0; n < args.iterations; ++n)
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i) {
      acc[i] = Kind::step(acc[i], a);
// Nor may it multiply once and add many times.
#if defined(PYLLM_ISA_AVX512)
      asm volatile("" : "+v"(acc[i].v));
#elif defined(PYLLM_ISA_AVX2)
      asm volatile("" : "+x"(a.lo), "+x"(a.hi));
#endif
    }
  f32x16 sum = acc[0];
#pragma GCC unroll 16
  for (int i = 1; i < kAccumulators; ++i) sum = sum + acc[i];
  args.sink[chunk] = reduce_add(sum);
  args.operations[chunk] += args.iterations * kAccumulators * Kind::operations;
}

}  // namespace

void peak_arithmetic(const PeakArithmeticArgs& a, int64_t chunk) {
  switch (a.kind) {
    case Arithmetic::F32: return repeat<F32>(a, chunk);
#if defined(PYLLM_ISA_AVX512) || defined(PYLLM_ISA_AVX2)
    case Arithmetic::Int8: return repeat<Int8>(a, chunk);
#endif
#if defined(PYLLM_ISA_AVX512)
    case Arithmetic::BF16: return repeat<BF16>(a, chunk);
#endif
    default: return;
  }
}

void read_memory(const ReadMemoryArgs& a, int64_t chunk) {
  const int64_t begin = chunk * a.bytes_per_chunk;
  const int64_t n = smaller(a.bytes_per_chunk, a.data.shape[0] - begin) / 256;
  const uint8_t* p = a.data.as<uint8_t>() + begin;
  f32x16 sums[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i < n; ++i, p += 256)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sums[j] = max(sums[j], load(reinterpret_cast<const float*>(p + 64 * j)));
  a.sink[chunk] = reduce_max(max(max(sums[0], sums[1]), max(sums[2], sums[3])));
}

}  // namespace pyllm::PYLLM_ISA

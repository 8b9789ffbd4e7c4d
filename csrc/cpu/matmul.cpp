// Unquantized weights as they lie in the file, row by row, nothing packed. An output is sixteen
// partial sums, lane i over the k = i mod 16 in ascending order, added at the end: the same float
// operations for any number of tokens, so a token's result does not depend on the others.
//
// Decoding is bound by the bytes of w. Many tokens are bound by fma: a tile of kTokens x kRows
// accumulators loads kTokens + kRows vectors for kTokens * kRows fma. Measured on Zen 4: 60 to 85 %
// of read bandwidth for one token (float32; 35 to 50 % for bfloat16), and for 128 tokens and more
// 90 to 95 % of one core's peak fma where PyTorch has 80 to 88, since the sums of a tile are added
// up together: one by one that took a fifth of the time at K = 576. Against PyTorch float32 is 1.1
// to 2.5 times as fast at 1 to 512 tokens, float16 3 to 6 times; bfloat16 1.0 to 1.7 times up to
// 128 tokens and 0.9 at 512, where packed weights would pay.
#include "cpu/matmul.h"

#include <type_traits>

#include "cpu/reduce_rows.h"

namespace pyllm::PYLLM_ISA {
namespace {

#if defined(PYLLM_ISA_AVX512)
constexpr int kTokens = 4, kRows = 6;
#else
constexpr int kTokens = 2, kRows = 2;
#endif

// Out of line: it is as long as a tile's loop and runs once a row.
template <class T>
__attribute__((noinline)) f32x16 load_tail(const T* p, int64_t n) {
  return load_n(p, n);
}

// How a vector of x and one of w are multiplied: widened to float32.
template <class T, class W>
struct Multiplier {
  static constexpr int kStep = kLanes;
  template <bool Tail, class P>
  PYLLM_INLINE f32x16 at(const P* p, int64_t n) {
    if constexpr (Tail) return load_tail(p, n);
    return load(p);
  }
  PYLLM_INLINE f32x16 add(f32x16 x, f32x16 w, f32x16 sum) { return fma(x, w, sum); }
};

#if defined(PYLLM_ISA_AVX512)
// Lane i sums the k = 2 i and 2 i + 1 mod 32. Products of bfloat16 are exact in float32.
template <>
struct Multiplier<bf16, bf16> {
  static constexpr int kStep = 2 * kLanes;
  template <bool Tail>
  PYLLM_INLINE __m512bh at(const bf16* p, int64_t n) {
    const __mmask32 mask = Tail ? (__mmask32{1} << n) - 1 : ~__mmask32{0};
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, p);
  }
  PYLLM_INLINE f32x16 add(__m512bh x, __m512bh w, f32x16 sum) {
    return {_mm512_dpbf16_ps(sum.v, x, w)};
  }
};
#endif

template <bool Tail, class T, class W, int Tokens, int Rows>
PYLLM_INLINE void add_products(f32x16 (&sums)[Tokens * Rows], const T* const (&x)[Tokens],
                               const W* const (&w)[Rows], int64_t k, int64_t n) {
  using M = Multiplier<T, W>;
  decltype(M::template at<Tail>(x[0], n)) xs[Tokens];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) xs[t] = M::template at<Tail>(x[t] + k, n);
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
    const auto ws = M::template at<Tail>(w[r] + k, n);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) sums[t * Rows + r] = M::add(xs[t], ws, sums[t * Rows + r]);
  }
}

// Stores the sums of N vectors as numbers, row after row.
template <int N, class Y>
PYLLM_INLINE void store_sums(const f32x16* sums, const float* bias, Y* out) {
  const f32x16 y = reduce_add_rows < N<kLanes ? N : kLanes>(sums);
  store(out, bias ? y + load(bias) : y);
  if constexpr (N > kLanes)
    store_sums<N - kLanes>(sums + kLanes, bias ? bias + kLanes : bias, out + kLanes);
}

template <class T, class W, int Tokens, int Rows>
void tile(const MatmulArgs& a, int64_t token, int64_t row, bool first) {
  constexpr int kStep = Multiplier<T, W>::kStep, kSums = Tokens * Rows;
  const int64_t depth = a.x.shape[1];
  const T* x[Tokens];
  const W* w[Rows];
  f32x16 sums[kSums];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) x[t] = a.x.row<T>(token + t);
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) w[r] = a.w.row<W>(row + r);
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = zero();
  int64_t k = 0;
  // The next rows of w are fetched with the first tokens that need these: up to 17 % faster for 8
  // tokens and for one with half-precision weights. With float32 weights, one token is faster
  // without.
  const int64_t ahead = first && (Tokens > 1 || sizeof(W) < 4) ? Rows * a.w.stride[0] : 0;
  for (; k + kStep <= depth; k += kStep) {
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) __builtin_prefetch(w[r] + k + ahead);
    add_products<false>(sums, x, w, k, kStep);
  }
  if (k < depth) add_products<true>(sums, x, w, k, depth - k);

  constexpr int kSpace = (kSums + kLanes - 1) / kLanes * kLanes;
  alignas(64) float bias[kSpace] = {};
  if (a.bias.defined())
    for (int t = 0; t < Tokens; ++t)
      std::memcpy(bias + t * Rows, a.bias.as<float>() + row, Rows * sizeof(float));
  dispatch_float(a.y.dtype, [&](auto* type) {
    using Y = std::remove_pointer_t<decltype(type)>;
    alignas(64) Y out[kSpace];
    store_sums<kSums>(sums, a.bias.defined() ? bias : nullptr, out);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t)
      std::memcpy(a.y.row<Y>(token + t) + row, out + t * Rows, Rows * sizeof(Y));
  });
}

template <class T, class W, int Tokens>
void multiply_tile(const MatmulArgs& a, int64_t token, int64_t row, int rows, bool first) {
  if (rows == kRows) return tile<T, W, Tokens, kRows>(a, token, row, first);
  for (int r = 0; r < rows; ++r) tile<T, W, Tokens, 1>(a, token, row + r, first);
}

template <class T, class W>
void multiply(const MatmulArgs& a, int64_t chunk) {
  const int64_t row_chunks = a.row_chunks();
  const int64_t first = chunk % row_chunks * a.rows_per_chunk;
  const int64_t last = smaller(first + a.rows_per_chunk, a.w.shape[0]);
  const int64_t begin = chunk / row_chunks * a.tokens_per_chunk;
  const int64_t end = smaller(begin + a.tokens_per_chunk, a.x.shape[0]);
  for (int64_t row = first; row < last; row += kRows) {
    const int rows = static_cast<int>(smaller(kRows, last - row));
    int64_t token = begin;
    for (; token + kTokens <= end; token += kTokens)
      multiply_tile<T, W, kTokens>(a, token, row, rows, token == begin);
    for (; token < end; ++token) multiply_tile<T, W, 1>(a, token, row, rows, token == begin);
  }
}

}  // namespace

void matmul(const MatmulArgs& a, int64_t chunk) {
  dispatch_float(a.x.dtype, [&](auto* x) {
    dispatch_float(a.w.dtype, [&](auto* w) {
      multiply<std::remove_pointer_t<decltype(x)>, std::remove_pointer_t<decltype(w)>>(a, chunk);
    });
  });
}

}  // namespace pyllm::PYLLM_ISA

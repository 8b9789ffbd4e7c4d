// Unquantized weights as they lie in the file, row by row, nothing packed. An output is sixteen
// partial sums, lane i over the k = i mod 16 in ascending order, added at the end: the same float
// operations for any number of tokens, so a token's result does not depend on the others.
//
// Decoding is bound by the bytes of w. Many tokens are bound by fma: a tile of kTokens x kRows
// accumulators loads kTokens + kRows vectors for kTokens * kRows fma. Measured on one Zen 4 core:
// 60 to 85 % of read bandwidth for one token (float32; 35 to 50 % for bfloat16) and 80 to 90 % of
// peak fma for 512. Against PyTorch 1.2 to 1.5 times as fast for 1 to 8 tokens, equal for 512 in
// float32; half as fast for 512 in bfloat16, where PyTorch multiplies in bfloat16 too.
#include "cpu/matmul.h"

#include <type_traits>

#include "cpu/simd.h"

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
template <bool Tail, class T>
PYLLM_INLINE f32x16 load_at(const T* p, int64_t n) {
  if constexpr (Tail) return load_tail(p, n);
  return load(p);
}

template <bool Tail, class T, class W, int Tokens, int Rows>
PYLLM_INLINE void add_products(f32x16 (&acc)[Tokens][Rows], const T* const (&x)[Tokens],
                               const W* const (&w)[Rows], int64_t k, int64_t n) {
  f32x16 xs[Tokens];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) xs[t] = load_at<Tail>(x[t] + k, n);
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
    const f32x16 ws = load_at<Tail>(w[r] + k, n);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) acc[t][r] = fma(xs[t], ws, acc[t][r]);
  }
}

template <class T, class W, int Tokens, int Rows>
void tile(const MatmulArgs& a, int64_t token, int64_t row, bool first, float (*out)[kRows]) {
  const int64_t depth = a.x.shape[1];
  const T* x[Tokens];
  const W* w[Rows];
  f32x16 acc[Tokens][Rows];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) x[t] = a.x.row<T>(token + t);
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
    w[r] = a.w.row<W>(row + r);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) acc[t][r] = zero();
  }
  int64_t k = 0;
  // The next rows of w are fetched with the first tokens that need these: up to 17 % faster for 8
  // tokens and for one with half-precision weights. With float32 weights, one token is faster
  // without.
  const int64_t ahead = first && (Tokens > 1 || sizeof(W) < 4) ? Rows * a.w.stride[0] : 0;
  for (; k + kLanes <= depth; k += kLanes) {
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) __builtin_prefetch(w[r] + k + ahead);
    add_products<false>(acc, x, w, k, kLanes);
  }
  if (k < depth) add_products<true>(acc, x, w, k, depth - k);
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) out[t][r] = reduce_add(acc[t][r]);
}

void store_tile(const MatmulArgs& a, int64_t token, int tokens, int64_t row, int rows,
                const float (*out)[kRows]) {
  const float* bias = a.bias.defined() ? a.bias.as<float>() + row : nullptr;
  dispatch_float(a.y.dtype, [&](auto* type) {
    using Y = std::remove_pointer_t<decltype(type)>;
    for (int t = 0; t < tokens; ++t) {
      Y* y = a.y.row<Y>(token + t) + row;
      for (int r = 0; r < rows; ++r) y[r] = from_float<Y>(bias ? out[t][r] + bias[r] : out[t][r]);
    }
  });
}

template <class T, class W, int Tokens>
void multiply_tile(const MatmulArgs& a, int64_t token, int64_t row, int rows, bool first) {
  float out[Tokens][kRows];
  if (rows == kRows) {
    tile<T, W, Tokens, kRows>(a, token, row, first, out);
    store_tile(a, token, Tokens, row, rows, out);
  } else {
    for (int r = 0; r < rows; ++r) {
      tile<T, W, Tokens, 1>(a, token, row + r, first, out);
      store_tile(a, token, Tokens, row + r, 1, out);
    }
  }
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

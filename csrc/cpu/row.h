// Loops over rows, sixteen values at a time. The last vector, of fewer, is taken out of the loop:
// nothing in it has to be asked for.
#pragma once
#include "cpu/simd.h"

namespace pyllm::PYLLM_ISA {
namespace {

#define PYLLM_LAMBDA __attribute__((always_inline))

// Calls f(i, n) for the values from i on, n of them at least or sixteen.
template <class F>
PYLLM_INLINE void over_row(int64_t d, F f) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) f(i, int64_t{kLanes});
  if (i < d) f(i, d - i);
}

// Stores the sum of n values of `a` and `b`, and returns it as it was stored: rounded to T.
template <class T>
PYLLM_INLINE f32x16 add_n(const T* a, const T* b, T* total, int64_t n) {
  const f32x16 v = load_n(a, n) + load_n(b, n);
  store_n(total, v, n);
  if constexpr (sizeof(T) == 4) return v;
  return load_n(total, n);
}

// Of each of R rows the sum of f(r, sum, i, n), which adds its values from i on to `sum`. There are
// four sums a row: one would wait for itself. The order is the same whatever R is.
template <int R, class F>
PYLLM_INLINE void sum_over_rows(int64_t d, float (&sums)[R], F f) {
  f32x16 s[R][4];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 4; ++j) s[r][j] = zero();
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j)
      for (int r = 0; r < R; ++r) s[r][j] = f(r, s[r][j], i + j * kLanes, int64_t{kLanes});
  for (; i + kLanes <= d; i += kLanes)
    for (int r = 0; r < R; ++r) s[r][0] = f(r, s[r][0], i, int64_t{kLanes});
  if (i < d)
    for (int r = 0; r < R; ++r) s[r][1] = f(r, s[r][1], i, d - i);
  for (int r = 0; r < R; ++r) sums[r] = reduce_add((s[r][0] + s[r][1]) + (s[r][2] + s[r][3]));
}

// Rows are done several at a time: what one waits for at its end (lanes added up, a root, a
// division) the others do meanwhile, and weights are read and widened once for all. As many as
// leave half of L1 to what is written, for wide rows one; and as there are registers for their
// sums.
constexpr int64_t kTogether = 16384;
#if defined(PYLLM_ISA_AVX512)
constexpr int kRowsAtOnce = 4;
#elif defined(PYLLM_ISA_AVX2)
constexpr int kRowsAtOnce = 2;
#else
constexpr int kRowsAtOnce = 1;
#endif

template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls f(Count<R>, i) for the rows from i to i + R, until all from `begin` to `end` had their
// turn.
template <int R = kRowsAtOnce, class F>
PYLLM_INLINE void over_rows(int64_t begin, int64_t end, int64_t row_bytes, F f) {
  if (R == 1 || R * row_bytes <= kTogether)
    for (; begin + R <= end; begin += R) f(Count<R>{}, begin);
  if constexpr (R > 1) over_rows<R / 2>(begin, end, row_bytes, f);
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA

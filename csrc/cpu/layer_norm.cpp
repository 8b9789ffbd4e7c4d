// A row is read from memory once and stays in L1 for two more passes: the variance is summed from
// differences to the mean, since E[x^2] - E[x]^2 cancels for rows with an offset. The floor is
// bytes over bandwidth: (1 read + 1 write) * D * itemsize a row, twice that with a residual. In the
// caches rows of halves are bound by their arithmetic, widening above all. Several rows at a time
// (see row.h) took 10 to 20 % less time there, and up to 10 % in float32.
#include "cpu/layer_norm.h"

#include <cmath>

#include "cpu/row.h"

namespace pyllm::PYLLM_ISA {
namespace {

template <int R, class T, class W>
void normalize_rows(const LayerNormArgs& a, int64_t first, int64_t h) {
  const int64_t d = a.x.shape[2];
  const T *source[R], *residual[R];
  T *total[R], *y[R];
  for (int r = 0; r < R; ++r) {
    const int64_t t = first + r;
    source[r] = a.x.row<T>(t, h), residual[r] = a.residual.row<T>(t, h);
    total[r] = a.residual_out.row<T>(t, h), y[r] = a.y.row<T>(t, h);
  }
  float sums[R];
  if (a.residual.defined()) {
    sum_over_rows<R>(d, sums, [&](int r, f32x16 s, int64_t i, int64_t n) PYLLM_LAMBDA {
      return s + add_n(source[r] + i, residual[r] + i, total[r] + i, n);
    });
    for (int r = 0; r < R; ++r) source[r] = total[r];
  } else {
    sum_over_rows<R>(d, sums, [&](int r, f32x16 s, int64_t i, int64_t n) PYLLM_LAMBDA {
      return s + load_n(source[r] + i, n);
    });
  }
  float mean[R];
  f32x16 center[R], scale[R];
  for (int r = 0; r < R; ++r) mean[r] = sums[r] / static_cast<float>(d);
  for (int r = 0; r < R; ++r) center[r] = splat(mean[r]);
  sum_over_rows<R>(d, sums, [&](int r, f32x16 s, int64_t i, int64_t n) PYLLM_LAMBDA {
    const f32x16 v = load_n(source[r] + i, n, mean[r]) - center[r];
    return fma(v, v, s);
  });
  for (int r = 0; r < R; ++r)
    scale[r] = splat(1.0f / std::sqrt(sums[r] / static_cast<float>(d) + a.eps));
  const W* weight = a.weight.as<W>();
  const W* bias = a.bias.as<W>();
  over_row(d, [&](int64_t i, int64_t n) PYLLM_LAMBDA {
    const f32x16 w = weight ? load_n(weight + i, n) : splat(1.0f);
    const f32x16 b = bias ? load_n(bias + i, n) : zero();
    for (int r = 0; r < R; ++r)
      store_n(y[r] + i, fma((load_n(source[r] + i, n) - center[r]) * scale[r], w, b), n);
  });
}

}  // namespace

void layer_norm(const LayerNormArgs& a, int64_t chunk) {
  const int64_t begin = chunk * a.tokens_per_chunk;
  const int64_t end = smaller(begin + a.tokens_per_chunk, a.x.shape[0]);
  dispatch_float(a.x.dtype, [&](auto* t) {
    dispatch_float(a.weight.dtype, [&](auto* w) {
      using T = std::remove_pointer_t<decltype(t)>;
      using W = std::remove_pointer_t<decltype(w)>;
      for (int64_t h = 0; h < a.x.shape[1]; ++h)
        over_rows(begin, end, a.x.shape[2] * sizeof(T), [&](auto rows, int64_t t) {
          normalize_rows<decltype(rows)::value, T, W>(a, t, h);
        });
    });
  });
}

}  // namespace pyllm::PYLLM_ISA

// The sums over a row are finished before its dx begins: the row and its dy are read from memory
// once and stay in L1. The floor is bytes over bandwidth: (2 reads + 1 write) * D * itemsize a row.
// Sums over rows are of a block first, and then over blocks, in an order that no thread has a say
// in.
#include "cpu/norm_backward.h"

#include <cmath>

#include "cpu/row.h"

namespace pyllm::PYLLM_ISA {
namespace {

template <bool Centered, int R, class T, class W>
void differentiate_rows(const NormBackwardArgs& a, int64_t first, float* dweight, float* dbias) {
  const int64_t d = a.x.shape[2], heads = a.x.shape[1];
  const T *x[R], *dy[R], *residual_grad[R];
  T* dx[R];
  for (int r = 0; r < R; ++r) {
    const int64_t t = (first + r) / heads, h = (first + r) % heads;
    x[r] = a.x.row<T>(t, h), dy[r] = a.dy.row<T>(t, h), dx[r] = a.dx.row<T>(t, h);
    residual_grad[r] = a.residual_grad.defined() ? a.residual_grad.row<T>(t, h) : nullptr;
  }
  const W* weight = a.weight.as<W>();
  const float inverse_d = 1.0f / static_cast<float>(d);
  const auto weighted = [&](f32x16 v, int64_t i, int64_t n)
                            PYLLM_LAMBDA { return weight ? v * load_n(weight + i, n) : v; };
  // Of two sums a row, those that have R added to their index are of g.
  float sums[2 * R], mean[R] = {}, mean_g[R] = {};
  if constexpr (Centered) {
    sum_over_rows<2 * R>(d, sums, [&](int r, f32x16 s, int64_t i, int64_t n) PYLLM_LAMBDA {
      return s + (r < R ? load_n(x[r] + i, n) : weighted(load_n(dy[r - R] + i, n), i, n));
    });
    for (int r = 0; r < R; ++r)
      mean[r] = sums[r] / static_cast<float>(d), mean_g[r] = sums[R + r] * inverse_d;
  }
  const auto centered = [&](int r, int64_t i, int64_t n) PYLLM_LAMBDA {
    return Centered ? load_n(x[r] + i, n, mean[r]) - splat(mean[r]) : load_n(x[r] + i, n);
  };
  sum_over_rows<2 * R>(d, sums, [&](int r, f32x16 s, int64_t i, int64_t n) PYLLM_LAMBDA {
    const f32x16 v = centered(r % R, i, n);
    return fma(v, r < R ? v : weighted(load_n(dy[r - R] + i, n), i, n), s);
  });
  f32x16 scale[R], minus_mean_gh[R];
  for (int r = 0; r < R; ++r) {
    const float s = 1.0f / std::sqrt(sums[r] / static_cast<float>(d) + a.eps);
    scale[r] = splat(s);
    minus_mean_gh[r] = splat(-s * sums[R + r] * inverse_d);
  }
  over_row(d, [&](int64_t i, int64_t n) PYLLM_LAMBDA {
    f32x16 of_weight = load_n(dweight + i, n), of_bias = dbias ? load_n(dbias + i, n) : zero();
    for (int r = 0; r < R; ++r) {
      const f32x16 h = centered(r, i, n) * scale[r], v = load_n(dy[r] + i, n);
      of_weight = fma(v, h, of_weight);
      if (Centered) of_bias = of_bias + v;
      f32x16 g = weighted(v, i, n);
      if (Centered) g = g - splat(mean_g[r]);
      g = fma(h, minus_mean_gh[r], g) * scale[r];
      if (residual_grad[r]) g = g + load_n(residual_grad[r] + i, n);
      store_n(dx[r] + i, g, n);
    }
    store_n(dweight + i, of_weight, n);
    if (dbias) store_n(dbias + i, of_bias, n);
  });
}

}  // namespace

void norm_backward(const NormBackwardArgs& a, int64_t chunk) {
  const int64_t d = a.x.shape[2], begin = chunk * a.rows_per_block();
  const int64_t end = smaller(begin + a.rows_per_block(), a.rows());
  float* dweight = a.partial.row<float>(0, chunk);
  float* dbias = a.partial.shape[0] > 1 ? a.partial.row<float>(1, chunk) : nullptr;
  std::memset(dweight, 0, d * sizeof(float));
  if (dbias) std::memset(dbias, 0, d * sizeof(float));
  dispatch_float(a.x.dtype, [&](auto* t) {
    dispatch_float(a.weight.dtype, [&](auto* w) {
      using T = std::remove_pointer_t<decltype(t)>;
      using W = std::remove_pointer_t<decltype(w)>;
      // Twice as many sums and twice as many bytes a row as the forward's.
      over_rows<(kRowsAtOnce > 1 ? kRowsAtOnce / 2 : 1)>(
          begin, end, 2 * d * sizeof(T), [&](auto rows, int64_t i) {
            constexpr int R = decltype(rows)::value;
            a.centered ? differentiate_rows<true, R, T, W>(a, i, dweight, dbias)
                       : differentiate_rows<false, R, T, W>(a, i, dweight, dbias);
          });
    });
  });
}

void norm_backward_sum(const NormBackwardSumArgs& a, int64_t chunk) {
  const int64_t begin = chunk * a.kColumns, blocks = a.partial.shape[1];
  const int64_t columns = smaller(a.kColumns, a.partial.shape[2] - begin);
  for (int64_t p = 0; p < a.partial.shape[0]; ++p) {
    const Tensor& y = p == 0 ? a.dweight : a.dbias;
    dispatch_float(y.dtype, [&](auto* type) {
      auto* out = y.as<std::remove_pointer_t<decltype(type)>>() + begin;
      over_row(columns, [&](int64_t i, int64_t n) PYLLM_LAMBDA {
        // A sum of sums: one after the other many would lose digits.
        f32x16 total = zero();
        for (int64_t b = 0; b < blocks; b += 16) {
          f32x16 s = zero();
          for (int64_t j = b; j < smaller(b + 16, blocks); ++j)
            s = s + load_n(a.partial.row<float>(p, j) + begin + i, n);
          total = total + s;
        }
        store_n(out + i, total, n);
      });
    });
  }
}

}  // namespace pyllm::PYLLM_ISA

// A row is read from memory once and stays in L1 for two more passes: the variance is summed from
// differences to the mean, since E[x^2] - E[x]^2 cancels for rows with an offset. The floor is
// bytes over bandwidth: (1 read + 1 write) * D * itemsize a row, twice that with a residual.
#include "cpu/layer_norm.h"

#include <cmath>

#include "cpu/row.h"

namespace pyllm::PYLLM_ISA {
namespace {

template <class T, class W>
void normalize_row(const LayerNormArgs& a, int64_t t, int64_t h) {
  const int64_t d = a.x.shape[2];
  const T* source = a.x.row<T>(t, h);
  float sum;
  if (a.residual.defined()) {
    const T* residual = a.residual.row<T>(t, h);
    T* total = a.residual_out.row<T>(t, h);
    sum = sum_over_row(d, [&](f32x16 s, int64_t i, int64_t n) PYLLM_LAMBDA {
      store_n(total + i, load_n(source + i, n) + load_n(residual + i, n), n);
      return s + load_n(total + i, n);  // what is normalized is what was stored: rounded to T
    });
    source = total;
  } else {
    sum = sum_over_row(
        d, [&](f32x16 s, int64_t i, int64_t n) PYLLM_LAMBDA { return s + load_n(source + i, n); });
  }
  const float mean = sum / static_cast<float>(d);
  const f32x16 center = splat(mean);
  const float squares = sum_over_row(d, [&](f32x16 s, int64_t i, int64_t n) PYLLM_LAMBDA {
    const f32x16 v = load_n(source + i, n, mean) - center;
    return fma(v, v, s);
  });
  const f32x16 scale = splat(1.0f / std::sqrt(squares / static_cast<float>(d) + a.eps));
  const W* weight = a.weight.as<W>();
  const W* bias = a.bias.as<W>();
  T* y = a.y.row<T>(t, h);
  over_row(d, [&](int64_t i, int64_t n) PYLLM_LAMBDA {
    f32x16 v = (load_n(source + i, n) - center) * scale;
    if (weight) v = v * load_n(weight + i, n);
    if (bias) v = v + load_n(bias + i, n);
    store_n(y + i, v, n);
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
      for (int64_t token = begin; token < end; ++token)
        for (int64_t h = 0; h < a.x.shape[1]; ++h) normalize_row<T, W>(a, token, h);
    });
  });
}

}  // namespace pyllm::PYLLM_ISA

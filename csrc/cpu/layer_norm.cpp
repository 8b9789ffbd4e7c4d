// A row is read from memory once and stays in L1 for two more passes: the variance is summed from
// differences to the mean, since E[x^2] - E[x]^2 cancels for rows with an offset. The floor is
// bytes over bandwidth: (1 read + 1 write) * D * itemsize a row, twice that with a residual.
#include "cpu/layer_norm.h"

#include <cmath>

#include "cpu/simd.h"

namespace pyllm::PYLLM_ISA {
namespace {

template <class T, class W>
void normalize_row(const LayerNormArgs& a, int64_t t, int64_t h) {
  const int64_t d = a.x.shape[2];
  const T* source = a.x.row<T>(t, h);
  f32x16 sum = zero();
  if (a.residual.defined()) {
    const T* residual = a.residual.row<T>(t, h);
    T* total = a.residual_out.row<T>(t, h);
    for (int64_t i = 0; i < d; i += kLanes) {
      store_n(total + i, load_n(source + i, d - i) + load_n(residual + i, d - i), d - i);
      sum = sum + load_n(total + i, d - i);  // what is normalized is what was stored: rounded to T
    }
    source = total;
  } else {
    for (int64_t i = 0; i < d; i += kLanes) sum = sum + load_n(source + i, d - i);
  }
  const float mean = reduce_add(sum) / static_cast<float>(d);
  const f32x16 center = splat(mean);
  f32x16 squares = zero();
  for (int64_t i = 0; i < d; i += kLanes) {
    const f32x16 v = load_n(source + i, d - i, mean) - center;
    squares = fma(v, v, squares);
  }
  const f32x16 scale = splat(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(d) + a.eps));
  const W* weight = a.weight.as<W>();
  const W* bias = a.bias.as<W>();
  T* y = a.y.row<T>(t, h);
  for (int64_t i = 0; i < d; i += kLanes) {
    f32x16 v = (load_n(source + i, d - i) - center) * scale;
    if (weight) v = v * load_n(weight + i, d - i);
    if (bias) v = v + load_n(bias + i, d - i);
    store_n(y + i, v, d - i);
  }
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

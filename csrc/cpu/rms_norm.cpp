// One pass over memory: a row is read once, kept in L1 while its squares are summed, and scaled.
// The floor is bytes over bandwidth: (1 read + 1 write) * D * itemsize a row, twice that with a
// residual.
#include "cpu/rms_norm.h"

#include <cmath>

#include "cpu/quantize_row.h"
#include "cpu/row.h"

namespace pyllm::PYLLM_ISA {
namespace {

template <class T, class W>
void normalize_row(const RmsNormArgs& a, int64_t t, int64_t h) {
  const int64_t d = a.x.shape[2];
  const T* x = a.x.row<T>(t, h);
  const T* residual = nullptr;
  T* sum_out = nullptr;
  if (a.residual.defined()) {
    residual = a.residual.row<T>(t, h);
    sum_out = a.residual_out.row<T>(t, h);
  }
  const float squares = sum_over_row(d, [&](f32x16 s, int64_t i, int64_t n) PYLLM_LAMBDA {
    f32x16 v = load_n(x + i, n);
    if (residual) {
      v = v + load_n(residual + i, n);
      store_n(sum_out + i, v, n);
      // What is normalized is what was stored: rounded to T.
      if constexpr (sizeof(T) < 4) v = load_n(sum_out + i, n);
    }
    return fma(v, v, s);
  });
  const f32x16 scale = splat(1.0f / std::sqrt(squares / static_cast<float>(d) + a.eps));
  const T* source = residual ? sum_out : x;
  const W* weight = a.weight.as<W>();
  if (a.quantized.defined()) {
    const ActivationLayout layout{d, a.group_size};
    return quantize_groups({a.quantized.row<uint8_t>(t), layout}, 0, layout.groups(),
                           [=](int64_t i) { return load(source + i) * scale * load(weight + i); });
  }
  T* y = a.y.row<T>(t, h);
  over_row(d, [&](int64_t i, int64_t n) PYLLM_LAMBDA {
    store_n(y + i, load_n(source + i, n) * scale * load_n(weight + i, n), n);
  });
}

}  // namespace

void rms_norm(const RmsNormArgs& a, int64_t chunk) {
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

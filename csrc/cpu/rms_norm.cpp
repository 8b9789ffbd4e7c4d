// One pass over memory: a row is read once, kept in L1 while its squares are summed, and scaled.
// The floor is bytes over bandwidth: (1 read + 1 write) * D * itemsize a row, twice that with a
// residual.
#include "cpu/rms_norm.h"

#include <cmath>

#include "cpu/quantize_row.h"

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
  f32x16 squares = zero();
  for (int64_t i = 0; i < d; i += kLanes) {
    f32x16 v = load_n(x + i, d - i);
    if (residual) {
      v = v + load_n(residual + i, d - i);
      store_n(sum_out + i, v, d - i);
      // What is normalized is what was stored: rounded to T.
      if constexpr (sizeof(T) < 4) v = load_n(sum_out + i, d - i);
    }
    squares = fma(v, v, squares);
  }
  const f32x16 scale = splat(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(d) + a.eps));
  const T* source = residual ? sum_out : x;
  const W* weight = a.weight.as<W>();
  if (a.quantized.defined()) {
    const ActivationLayout layout{d, a.group_size};
    return quantize_groups({a.quantized.row<uint8_t>(t), layout}, 0, layout.groups(),
                           [=](int64_t i) { return load(source + i) * scale * load(weight + i); });
  }
  T* y = a.y.row<T>(t, h);
  for (int64_t i = 0; i < d; i += kLanes)
    store_n(y + i, load_n(source + i, d - i) * scale * load_n(weight + i, d - i), d - i);
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

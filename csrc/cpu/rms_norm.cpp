// One pass over memory: a row is read once, kept in L1 while its squares are summed, and scaled.
// The floor is bytes over bandwidth: (1 read + 1 write) * D * itemsize a row, twice that with a
// residual.
#include "cpu/rms_norm.h"

#include <cmath>

#include "cpu/quantize_row.h"
#include "cpu/row.h"

namespace pyllm::PYLLM_ISA {
namespace {

template <int R, class T, class W>
void normalize_rows(const RmsNormArgs& a, int64_t first, int64_t h) {
  const int64_t d = a.x.shape[2];
  const T *source[R], *residual[R];
  T *total[R], *y[R];
  for (int r = 0; r < R; ++r) {
    const int64_t t = first + r;
    source[r] = a.x.row<T>(t, h), residual[r] = a.residual.row<T>(t, h);
    total[r] = a.residual_out.row<T>(t, h), y[r] = a.y.row<T>(t, h);
  }
  float squares[R];
  if (a.residual.defined()) {
    sum_over_rows<R>(d, squares, [&](int r, f32x16 s, int64_t i, int64_t n) PYLLM_LAMBDA {
      const f32x16 v = add_n(source[r] + i, residual[r] + i, total[r] + i, n);
      return fma(v, v, s);
    });
    for (int r = 0; r < R; ++r) source[r] = total[r];
  } else {
    sum_over_rows<R>(d, squares, [&](int r, f32x16 s, int64_t i, int64_t n) PYLLM_LAMBDA {
      const f32x16 v = load_n(source[r] + i, n);
      return fma(v, v, s);
    });
  }
  f32x16 scale[R];
  for (int r = 0; r < R; ++r)
    scale[r] = splat(1.0f / std::sqrt(squares[r] / static_cast<float>(d) + a.eps));
  const W* weight = a.weight.as<W>();
  if (a.quantized.defined()) {
    const ActivationLayout layout{d, a.group_size};
    for (int r = 0; r < R; ++r) {
      const T* row = source[r];
      const f32x16 by = scale[r];
      quantize_groups({a.quantized.row<uint8_t>(first + r), layout}, 0, layout.groups(),
                      [=](int64_t i) { return load(row + i) * by * load(weight + i); });
    }
    return;
  }
  over_row(d, [&](int64_t i, int64_t n) PYLLM_LAMBDA {
    const f32x16 w = load_n(weight + i, n);
    for (int r = 0; r < R; ++r) store_n(y[r] + i, load_n(source[r] + i, n) * scale[r] * w, n);
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
      for (int64_t h = 0; h < a.x.shape[1]; ++h)
        over_rows(begin, end, a.x.shape[2] * sizeof(T), [&](auto rows, int64_t t) {
          normalize_rows<decltype(rows)::value, T, W>(a, t, h);
        });
    });
  });
}

}  // namespace pyllm::PYLLM_ISA

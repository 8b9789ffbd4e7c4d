// One pass over memory. The floor is bytes over bandwidth, (1 or 2 reads + 1 write) * D * itemsize
// a row, while the data is in memory; in the caches it is the exponential's twenty operations.
#include "cpu/activation.h"

#include <type_traits>

#include "cpu/quantize_row.h"
#include "cpu/row.h"

namespace pyllm::PYLLM_ISA {
namespace {

// x / (1 + e^-u), given -u: no cancellation on either side.
PYLLM_INLINE f32x16 times_sigmoid(f32x16 x, f32x16 minus_u) {
  return x / (splat(1.0f) + exp(minus_u));
}

// The normal distribution function, (1 + erf(x / sqrt 2)) / 2, to a few ulp also where it is small:
// Phi(-t) = exp(-t^2 / 2) P((t - 3) / (t + 3)) for t >= 0, P a minimax fit with error 8e-9.
PYLLM_INLINE f32x16 normal_cdf(f32x16 x) {
  const f32x16 t = min(splat(16.0f), abs(x));  // Phi(-16) is 0 in float; the order keeps NaN
  const f32x16 y = (t - splat(3.0f)) / (t + splat(3.0f));
  constexpr float kCoefficients[] = {1.155439565e-04f, -3.394851928e-04f, -9.837586147e-04f,
                                     2.904556327e-03f, 6.132070701e-03f,  -4.621329098e-02f,
                                     1.232250307e-01f, -2.064026190e-01f, 1.215139476e-01f};
  f32x16 p = splat(5.367208525e-05f);
  for (float c : kCoefficients) p = fma(p, y, splat(c));
  // t^2 rounds, and its error would come out t^2 / 2 times larger: carry it along.
  const f32x16 square = t * t, rest = fma(t, t, zero() - square);
  const f32x16 lower = exp(square * splat(-0.5f)) * fma(p * rest, splat(-0.5f), p);
  return select_less(zero(), x, splat(1.0f) - lower, lower);
}

struct Relu {
  PYLLM_INLINE f32x16 apply(f32x16 x) { return max(zero(), x); }
};
struct Silu {
  PYLLM_INLINE f32x16 apply(f32x16 x) { return times_sigmoid(x, zero() - x); }
};
struct Gelu {
  PYLLM_INLINE f32x16 apply(f32x16 x) { return x * normal_cdf(x); }
};
// (1 + tanh u) / 2 is the sigmoid of 2 u.
struct GeluTanh {
  PYLLM_INLINE f32x16 apply(f32x16 x) {
    const f32x16 cubic = fma(x * x, splat(0.044715f), splat(1.0f)) * x;
    return times_sigmoid(x, cubic * splat(-1.5957691216057308f));  // -2 sqrt(2 / pi)
  }
};

template <class F, class T>
void apply_row(const T* x, const T* up, T* y, int64_t n) {
  over_row(n, [&](int64_t i, int64_t left) PYLLM_LAMBDA {
    f32x16 v = F::apply(load_n(x + i, left));
    if (up) v = v * load_n(up + i, left);
    store_n(y + i, v, left);
  });
}

template <class F, class T>
void quantize_block(const ActivationArgs& a, int64_t t, int64_t column, int64_t n) {
  const T* x = a.x.row<T>(t);
  const T* up = a.up.defined() ? a.up.row<T>(t) : nullptr;
  const int g = a.group_size;
  quantize_groups({a.quantized.row<uint8_t>(t), {a.x.shape[2], g}}, column / g, (column + n) / g,
                  [=](int64_t i) {
                    const f32x16 v = F::apply(load(x + i));
                    return up ? v * load(up + i) : v;
                  });
}

template <class F>
void apply_chunk(const ActivationArgs& a, int64_t chunk) {
  const int64_t column = chunk % a.blocks() * a.kColumns;
  const int64_t n = smaller(a.kColumns, a.x.shape[2] - column);
  const int64_t begin = chunk / a.blocks() * a.tokens_per_chunk;
  const int64_t end = smaller(begin + a.tokens_per_chunk, a.x.shape[0]);
  dispatch_float(a.x.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    if (a.quantized.defined()) {
      for (int64_t t = begin; t < end; ++t) quantize_block<F, T>(a, t, column, n);
      return;
    }
    for (int64_t t = begin; t < end; ++t)
      for (int64_t h = 0; h < a.x.shape[1]; ++h)
        apply_row<F>(a.x.row<T>(t, h) + column,
                     a.up.defined() ? a.up.row<T>(t, h) + column : nullptr,
                     a.y.row<T>(t, h) + column, n);
  });
}

}  // namespace

void activation(const ActivationArgs& a, int64_t chunk) {
  switch (a.kind) {
    case Activation::kRelu: return apply_chunk<Relu>(a, chunk);
    case Activation::kSilu: return apply_chunk<Silu>(a, chunk);
    case Activation::kGelu: return apply_chunk<Gelu>(a, chunk);
    case Activation::kGeluTanh: return apply_chunk<GeluTanh>(a, chunk);
  }
}

}  // namespace pyllm::PYLLM_ISA

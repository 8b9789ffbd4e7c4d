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

template <int N>
PYLLM_INLINE f32x16 polynomial(const float (&coefficients)[N], f32x16 x) {
  f32x16 p = splat(coefficients[0]);
#pragma GCC unroll 9
  for (int i = 1; i < N; ++i) p = fma(p, x, splat(coefficients[i]));
  return p;
}

// The normal distribution function, (1 + erf(x / sqrt 2)) / 2, also where it is small to a few ulp,
// or to 16 bits for values that will be rounded to fewer. Phi(-t) = exp(-t^2 / 2) P(1 / (t + c))
// for t >= 0; bench/minimax.py finds the polynomials. What counts is multiplications, 24 and 18.
template <bool kShort>
PYLLM_INLINE f32x16 normal_cdf(f32x16 x) {
  constexpr float kFurthest = 13.2f;  // beyond it the result is not a normal float
  constexpr float kC = kShort ? 2.75f : 2.5f;
  const f32x16 t = min(splat(kFurthest), abs(x)), square = t * t;
  const f32x16 y = reciprocal(t + splat(kC)) - splat(0.25f);
  // exp(-t^2 / 2) = 2^-n exp(-r / 2), r = t^2 - 2 n ln 2. The square in r must not have rounded
  // before: its error would come out multiplied by it.
  const f32x16 n = round(square * splat(0.5f * 1.44269504088896341f));
  const f32x16 reduced = fma_rounded_once(t, t, n * splat(-2 * kLn2High));
  const f32x16 r = fma(n, splat(-2 * kLn2Low), reduced);
  f32x16 p, power;
  if constexpr (kShort) {
    constexpr float kCdf[] = {-1.532763439e+01f, -5.280254382e+00f, 5.259404379e+00f,
                              4.786411245e+00f,  1.767729845e+00f,  2.307599231e-01f};
    constexpr float kPower[] = {2.591162883e-03f, -2.098863401e-02f, 1.250108967e-01f,
                                -4.999817024e-01f, 9.999992614e-01f};
    p = polynomial(kCdf, y);
    power = polynomial(kPower, r);
  } else {
    constexpr float kCdf[] = {-6.114975850e+01f, 1.386709027e+00f,  1.730109493e+01f,
                              -4.505419261e+00f, -4.941563582e+00f, 2.234722612e+00f,
                              3.230495366e+00f,  1.444340044e+00f,  2.057806547e-01f};
    constexpr float kPower[] = {2.162007130e-05f,
                                -2.617129938e-04f,
                                2.604264098e-03f,
                                -2.083302521e-02f,
                                1.249999802e-01f,
                                -5.000000182e-01f,
                                1.0f};
    p = polynomial(kCdf, y);
    power = polynomial(kPower, r);
  }
  const f32x16 lower =
      select_less(t, splat(kFurthest), p * scale_by_power(power, zero() - n), zero());
  return select_less(zero(), x, splat(1.0f) - lower, lower);
}

// Each to float32's accuracy or, if T is a half, to its.
struct Relu {
  template <class T>
  PYLLM_INLINE f32x16 apply(f32x16 x) {
    return max(zero(), x);
  }
};
struct Silu {
  template <class T>
  PYLLM_INLINE f32x16 apply(f32x16 x) {
    return times_sigmoid(x, zero() - x);
  }
};
struct Gelu {
  template <class T>
  PYLLM_INLINE f32x16 apply(f32x16 x) {
    return x * normal_cdf<sizeof(T) == 2>(x);
  }
};
// (1 + tanh u) / 2 is the sigmoid of 2 u.
struct GeluTanh {
  template <class T>
  PYLLM_INLINE f32x16 apply(f32x16 x) {
    const f32x16 cubic = fma(x * x, splat(0.044715f), splat(1.0f)) * x;
    return times_sigmoid(x, cubic * splat(-1.5957691216057308f));  // -2 sqrt(2 / pi)
  }
};

template <class F, class T>
void apply_row(const T* x, const T* up, T* y, int64_t n) {
  over_row(n, [&](int64_t i, int64_t left) PYLLM_LAMBDA {
    f32x16 v = F::template apply<T>(load_n(x + i, left));
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
                    const f32x16 v = F::template apply<T>(load(x + i));
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

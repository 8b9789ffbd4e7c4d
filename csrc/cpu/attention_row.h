// What is done with one row (a query of a head) of attention after its scores are weighed.
#pragma once
#include "cpu/attention.h"
#include "cpu/simd.h"

namespace pyllm::PYLLM_ISA {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
using Sequence = AttentionArgs::Sequence;
using Range = AttentionArgs::Range;

PYLLM_INLINE float exp2_one(float x) {
  float lanes[kLanes];
  store(lanes, exp2(splat(x)));
  return lanes[0];
}
// What scores are measured from: the maximum, or 0 where nothing has been seen.
PYLLM_INLINE float base_of(float maximum) { return maximum == -kInf ? 0.0f : maximum; }

// Adds one row's softmax over later keys to that over earlier ones.
PYLLM_INLINE void merge(float& maximum, float& sum, float* values, float more_maximum,
                        float more_sum, const float* more_values, int64_t width) {
  const float top = more_maximum > maximum ? more_maximum : maximum;
  const float a = exp2_one(maximum - base_of(top)), b = exp2_one(more_maximum - base_of(top));
  maximum = top;
  sum = sum * a + more_sum * b;
  for (int64_t i = 0; i < width; i += kLanes)
    store(values + i, fma(load(more_values + i), splat(b), load(values + i) * splat(a)));
}

// Writes a row's result, given its softmax over all keys.
PYLLM_INLINE void finish(const AttentionArgs& a, const Sequence& s, int64_t i, int64_t head,
                         float maximum, float sum, const float* values) {
  float factor = 1.0f;
  if (a.sinks) {
    const float sink = a.sinks[head] * kLog2e;
    const float top = sink > maximum ? sink : maximum;
    factor = exp2_one(maximum - base_of(top));
    sum = sum * factor + exp2_one(sink - base_of(top));
    maximum = top;
  }
  if (a.lse) a.lse[a.token(s, i) * a.q.shape[2] + head] = (maximum + __builtin_log2f(sum)) / kLog2e;
  if (a.v_scale) factor *= a.v_scale[head / a.group];
  const f32x16 scale = splat(sum == 0.0f ? 0.0f : factor / sum);
  const int64_t d = a.q.shape[3];
  dispatch_float(a.out.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* out = a.out.row<T>(s.b, s.q_start + i) + head * a.out.stride[2];
    for (int64_t j = 0; j < d; j += kLanes) store_n(out + j, load(values + j) * scale, d - j);
  });
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA

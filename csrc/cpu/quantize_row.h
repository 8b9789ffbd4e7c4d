// One row of activations to int8, for every kernel that emits them.
#pragma once
#include "cpu/quantize_activation.h"
#include "cpu/simd.h"

namespace pyllm::PYLLM_ISA {
namespace {

// d = max|x| / 127 and q = x / d to the nearest, ties to even. Groups with no value above 1e-30
// count as zero (d = 0). A group with NaN or inf gets d = NaN, so that every output that it takes
// part in is NaN.
template <class T>
PYLLM_INLINE void quantize_row(const T* x, ActivationLayout layout, uint8_t* row) {
  int8_t* q = reinterpret_cast<int8_t*>(row);
  float* scale = reinterpret_cast<float*>(row + layout.scale_at());
  float* sum = reinterpret_cast<float*>(row + layout.sum_at());
  int32_t* correction = reinterpret_cast<int32_t*>(row + layout.correction_at());
  for (int64_t g = 0; g < layout.groups(); ++g, x += layout.group_size, q += layout.group_size) {
    const bool two = layout.group_size == 2 * kLanes;
    const f32x16 v0 = load(x), v1 = two ? load(x + kLanes) : zero();
    const float top = reduce_max(max(abs(v0), abs(v1)));
    // Zero, or NaN if any value is not finite: comparisons alone lose NaN.
    const float poison = reduce_add(fma(v0, zero(), v1 * zero()));
    const bool tiny = !(top > 1e-30f) || poison != poison;
    const float d = tiny ? poison : top / 127.0f;
    const f32x16 inverse = splat(tiny ? 0.0f : 127.0f / top);
    // The limits come second, which makes NaN a number.
    const f32x16 q0 = round(min(max(v0 * inverse, splat(-127.0f)), splat(127.0f)));
    const f32x16 q1 = round(min(max(v1 * inverse, splat(-127.0f)), splat(127.0f)));
    store_int8(q, q0);
    if (two) store_int8(q + kLanes, q1);
    const float total = reduce_add(q0 + q1);
    scale[g] = d;
    sum[g] = d * total;
    correction[g] = -8 * static_cast<int32_t>(total);
  }
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA

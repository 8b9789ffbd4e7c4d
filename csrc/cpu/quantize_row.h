// One row of activations to int8, for every kernel that emits them.
#pragma once
#include "cpu/quantize_activation.h"
#include "cpu/simd.h"

namespace pyllm::PYLLM_ISA {
namespace {

// One row of quantized activations while it is written.
struct QuantizedRow {
  int8_t* q;
  float* scale;
  float* sum;
  int32_t* correction;
  int group_size;

  QuantizedRow(uint8_t* row, ActivationLayout layout)
      : q(reinterpret_cast<int8_t*>(row)),
        scale(reinterpret_cast<float*>(row + layout.scale_at())),
        sum(reinterpret_cast<float*>(row + layout.sum_at())),
        correction(reinterpret_cast<int32_t*>(row + layout.correction_at())),
        group_size(layout.group_size) {}
};

// Writes group g, whose values are v0 and v1 (zeros for groups of 16). d = max|x| / 127 and q = x /
// d to the nearest, ties to even. Groups with no value above 1e-30 count as zero (d = 0). A group
// with NaN or inf gets d = NaN, so that every output that it takes part in is NaN.
PYLLM_INLINE void quantize_group(QuantizedRow row, int64_t g, f32x16 v0, f32x16 v1) {
  const float top = reduce_max(max(abs(v0), abs(v1)));
  // Zero, or NaN if any value is not finite: comparisons alone lose NaN.
  const float poison = reduce_add(fma(v0, zero(), v1 * zero()));
  const bool tiny = !(top > 1e-30f) || poison != poison;
  const f32x16 inverse = splat(tiny ? 0.0f : 127.0f / top);
  // The limits come second, which makes NaN a number.
  const f32x16 q0 = round(min(max(v0 * inverse, splat(-127.0f)), splat(127.0f)));
  const f32x16 q1 = round(min(max(v1 * inverse, splat(-127.0f)), splat(127.0f)));
  store_int8(row.q + g * row.group_size, q0);
  if (row.group_size == 2 * kLanes) store_int8(row.q + g * row.group_size + kLanes, q1);
  const float total = reduce_add(q0 + q1), d = tiny ? poison : top / 127.0f;
  row.scale[g] = d;
  row.sum[g] = d * total;
  row.correction[g] = -8 * static_cast<int32_t>(total);
}

// Writes groups [begin, end) of a row whose sixteen values from k on are value(k).
template <class F>
PYLLM_INLINE void quantize_groups(QuantizedRow row, int64_t begin, int64_t end, F value) {
  for (int64_t g = begin; g < end; ++g) {
    const int64_t k = g * row.group_size;
    quantize_group(row, g, value(k), row.group_size == 2 * kLanes ? value(k + kLanes) : zero());
  }
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA

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

// Writes n groups from `first` on, at most sixteen, with one division for all: what is done once a
// group is done in its lane. (Reducing sixteen groups by a transposition was slower than one by
// one.)
// d = max|x| / 127 and q = x / d to the nearest, ties to even. Groups with no value above 1e-30
// count as zero (d = 0). A group with NaN or inf gets d = NaN, so that every output that it takes
// part in is NaN.
template <int GroupSize, class F>
PYLLM_INLINE void quantize_block(QuantizedRow row, int64_t first, int n, F value) {
  constexpr int kVectors = GroupSize / kLanes;
  alignas(64) float values[kLanes][kVectors][kLanes], tops[kLanes] = {}, inverses[kLanes],
                                                      totals[kLanes] = {};
  for (int i = 0; i < n; ++i) {
    f32x16 top = zero();
    for (int v = 0; v < kVectors; ++v) {
      const f32x16 x = value((first + i) * GroupSize + v * kLanes);
      store(values[i][v], x);
      top = max(top, min(abs(x), splat(kInf)));  // in this order NaN counts as inf
    }
    tops[i] = reduce_max(top);
  }
  const f32x16 top = load(tops);
  const f32x16 tiny = splat(1e-30f), poison = top - top;  // 0, or NaN if any value is not finite
  const f32x16 d = select_less(tiny, top, top / splat(127.0f) + poison, poison);
  const f32x16 inverse = select_less(top, splat(kInf), splat(127.0f) / top, zero());
  store(inverses, select_less(tiny, top, inverse, zero()));
  for (int i = 0; i < n; ++i) {
    f32x16 total = zero();
    for (int v = 0; v < kVectors; ++v) {
      // The limit makes NaN a number.
      const f32x16 x = load(values[i][v]) * splat(inverses[i]);
      const f32x16 q = round(max(x, splat(-127.0f)));
      store_int8(row.q + (first + i) * GroupSize + v * kLanes, q);
      total = total + q;
    }
    totals[i] = reduce_add(total);
  }
  store_n(row.scale + first, d, n);
  store_n(row.sum + first, d * load(totals), n);
  for (int i = 0; i < n; ++i) row.correction[first + i] = -8 * static_cast<int32_t>(totals[i]);
}

// Writes groups [begin, end) of a row whose sixteen values from k on are value(k).
template <class F>
PYLLM_INLINE void quantize_groups(QuantizedRow row, int64_t begin, int64_t end, F value) {
  const int64_t blocks = (end - begin + kLanes - 1) / kLanes;
  for (int64_t b = 0; b < blocks; ++b) {  // of nearly equal size
    const int64_t first = begin + (end - begin) * b / blocks;
    const int n = static_cast<int>(begin + (end - begin) * (b + 1) / blocks - first);
    if (row.group_size == 2 * kLanes)
      quantize_block<2 * kLanes>(row, first, n, value);
    else
      quantize_block<kLanes>(row, first, n, value);
  }
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA

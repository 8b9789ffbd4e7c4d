// Loops over a row, sixteen values at a time. The last vector, of fewer, is taken out of the loop:
// nothing in it has to be asked for.
#pragma once
#include "cpu/simd.h"

namespace pyllm::PYLLM_ISA {
namespace {

#define PYLLM_LAMBDA __attribute__((always_inline))

// Calls f(i, n) for the values from i on, n of them at least or sixteen.
template <class F>
PYLLM_INLINE void over_row(int64_t d, F f) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) f(i, int64_t{kLanes});
  if (i < d) f(i, d - i);
}

// Sums f(sum, i, n), which adds the values from i on to `sum`, with four sums in flight: one would
// wait for itself.
template <class F>
PYLLM_INLINE float sum_over_row(int64_t d, F f) {
  f32x16 s[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= d; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) s[j] = f(s[j], i + j * kLanes, int64_t{kLanes});
  for (; i + kLanes <= d; i += kLanes) s[0] = f(s[0], i, int64_t{kLanes});
  if (i < d) s[1] = f(s[1], i, d - i);
  return reduce_add((s[0] + s[1]) + (s[2] + s[3]));
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA

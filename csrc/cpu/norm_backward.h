#pragma once
#include "core/tensor.h"

namespace pyllm {

// The gradients of layer_norm (`centered`) and rms_norm, for g = dy * weight and h, the row as it
// was normalized: dx = (g - h * mean(g * h)) / deviation + residual_grad, less mean(g) in the
// parentheses if centered. Rows are [T, H, D] with any strides but the last; weight and
// residual_grad may be undefined. `partial` is float32 [P, B, D]: of each of B blocks of rows the
// sums of dy * h and, if P is 2, of dy. A chunk is a block.
struct NormBackwardArgs {
  Tensor dy, x, weight, residual_grad, dx, partial;
  float eps;
  bool centered;
  int64_t rows() const { return x.shape[0] * x.shape[1]; }
  int64_t rows_per_block() const { return (rows() + chunks() - 1) / chunks(); }
  int64_t chunks() const { return partial.shape[1]; }
};

// Adds the blocks up: dweight and, if it is defined, dbias. A chunk is some columns.
struct NormBackwardSumArgs {
  static constexpr int64_t kColumns = 256;
  Tensor partial, dweight, dbias;
  int64_t chunks() const { return (partial.shape[2] + kColumns - 1) / kColumns; }
};

}  // namespace pyllm

#pragma once
#include "core/tensor.h"

namespace pyllm {

// y = x / sqrt(mean(x^2) + eps) * weight, row by row; with a residual, x + residual is what is
// normalized, and it is written to residual_out. All but the weight are [T, H, D] with any strides
// but the last, so that heads inside a fused projection need no copy. A chunk is a block of T.
// Where `quantized` is given, y is not written but quantized there, for a matmul that follows; then
// H is 1.
struct RmsNormArgs {
  Tensor x, weight, residual, y, residual_out, quantized;
  int group_size;
  float eps;
  int64_t tokens_per_chunk;
  int64_t chunks() const { return (x.shape[0] + tokens_per_chunk - 1) / tokens_per_chunk; }
};

}  // namespace pyllm

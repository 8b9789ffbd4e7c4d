#pragma once
#include "core/tensor.h"

namespace pyllm {

// y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, row by row; with a residual, x + residual
// is what is normalized, and it is written to residual_out. All but weight and bias, which may be
// undefined, are [T, H, D] with any strides but the last. A chunk is a block of T.
struct LayerNormArgs {
  Tensor x, weight, bias, residual, y, residual_out;
  float eps;
  int64_t tokens_per_chunk;
  int64_t chunks() const { return (x.shape[0] + tokens_per_chunk - 1) / tokens_per_chunk; }
};

}  // namespace pyllm

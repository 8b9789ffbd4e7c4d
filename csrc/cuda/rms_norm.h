#pragma once
#include "core/tensor.h"

namespace pyllm::cuda {

// y = x / sqrt(mean(x^2) + eps) * weight, row by row; with a residual, x + residual is what is
// normalized, and it is written to residual_out. All but the weight are [T, H, D] with any strides
// but the last.
struct RmsNormArgs {
  Tensor x, weight, residual, y, residual_out;
  float eps;
};

}  // namespace pyllm::cuda

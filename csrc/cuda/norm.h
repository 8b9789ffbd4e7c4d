#pragma once
#include "core/tensor.h"

namespace pyllm::cuda {

// y = norm(x) * weight + bias, row by row; with a residual, x + residual is what is normalized, and
// it is written to residual_out. The rows are [T, H, D] with any strides but the last. y is of x's
// dtype, or int8 or uint8 (the bits of e4m3) with y about scale * q and scale float32 [T * H].
// Weight and bias are of x's dtype or float32, both the same.
struct NormArgs {
  Tensor x, weight, bias, residual, y, residual_out, scale;
  float eps;
};

// dx = d(norm)/dx applied to dy, plus residual_grad; dweight and dbias [D] in any float dtype. x is
// what was normalized. scratch: float32 of norm_backward_scratch(rows, D) values.
struct NormBackwardArgs {
  Tensor dy, x, weight, residual_grad, dx, dweight, dbias, scratch;
  float eps;
};

// Gradients of the parameters are summed in this many parts, then over the parts in order. It
// depends on nothing but the shape: so do the bits.
inline constexpr int64_t kNormParts = 256;
// The columns that a block of the one-pass backward kernel can hold, eight a thread.
inline constexpr int64_t kNormFusedWidth = 8192;

inline int64_t norm_parts(int64_t rows, int64_t width) {
  const int64_t most = width <= kNormFusedWidth ? kNormParts : kNormParts / 8;
  return rows < most ? rows : most;
}
inline int64_t norm_padded(int64_t width) { return (width + 7) / 8 * 8; }
inline int64_t norm_backward_scratch(int64_t rows, int64_t width) {
  return 2 * norm_parts(rows, width) * norm_padded(width) + 2 * rows;
}

}  // namespace pyllm::cuda

#pragma once
#include "core/quant_matrix.h"
#include "core/tensor.h"

namespace pyllm {

// y[t, n] = sum over k of x[t, k] * w[n, k], plus bias[n]. x [T, row_bytes] comes from
// quantize_activation with the group size of w; y is [T, N] of any float dtype, bias float32 [N].
// A chunk is a block of panels of w times a block of tokens.
struct QuantMatmulArgs {
  Tensor x, bias, y;
  QuantMatrix w;
  int64_t panels_per_chunk, tokens_per_chunk;
  int64_t panel_chunks() const { return (w.panels() + panels_per_chunk - 1) / panels_per_chunk; }
  int64_t chunks() const {
    return panel_chunks() * ((x.shape[0] + tokens_per_chunk - 1) / tokens_per_chunk);
  }
};

}  // namespace pyllm

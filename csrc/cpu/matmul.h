#pragma once
#include "core/tensor.h"

namespace pyllm {

// y[t, n] = sum over k of x[t, k] * w[n, k], plus bias[n]: x [T, K], w [N, K], y [T, N], each in a
// float dtype of its own, rows at any stride; bias float32 [N]. A chunk is a block of rows of w
// times a block of tokens.
struct MatmulArgs {
  Tensor x, w, bias, y;
  int64_t rows_per_chunk, tokens_per_chunk;
  int64_t row_chunks() const { return (w.shape[0] + rows_per_chunk - 1) / rows_per_chunk; }
  int64_t chunks() const {
    return row_chunks() * ((x.shape[0] + tokens_per_chunk - 1) / tokens_per_chunk);
  }
};

}  // namespace pyllm

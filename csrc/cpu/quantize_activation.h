#pragma once
#include "core/tensor.h"

namespace pyllm {

// Rows of activations as quant_matmul reads them: int8 with a scale per group of `group_size`
// consecutive k. A row is one block of bytes, its parts one after the other:
//   int8 q[K], float d[G], float s[G], int32 c[G];  x is about d * q
// s = d * sum(q) multiplies a weight's minimum; c = -8 * sum(q) starts the integer dot product
// where quants have an offset of 8 (or, shifted left by four, of 128).
struct ActivationLayout {
  int64_t k;
  int group_size;
  int64_t groups() const { return k / group_size; }
  int64_t scale_at() const { return k; }
  int64_t sum_at() const { return k + 4 * groups(); }
  int64_t correction_at() const { return k + 8 * groups(); }
  int64_t row_bytes() const { return (k + 12 * groups() + 63) / 64 * 64; }
};

// x [T, K] in any float dtype to q [T, row_bytes]. A chunk is a block of rows.
struct QuantizeActivationArgs {
  Tensor x, q;
  int group_size;
  int64_t tokens_per_chunk;
  int64_t chunks() const { return (x.shape[0] + tokens_per_chunk - 1) / tokens_per_chunk; }
};

}  // namespace pyllm

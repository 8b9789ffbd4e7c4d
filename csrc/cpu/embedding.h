#pragma once
#include "core/quant_matrix.h"
#include "core/tensor.h"

namespace pyllm {

// y[t] = row ids[t] of the weight: a tensor [V, D] of a float dtype, or, where that is undefined, a
// quantized matrix of V rows. A row that does not exist reads nothing and becomes NaN: the ids of a
// replayed plan were never checked. A chunk is a block of tokens.
struct EmbeddingArgs {
  Tensor ids, weight, y;
  QuantMatrix quantized;
  int64_t tokens_per_chunk;
  int64_t chunks() const { return (ids.shape[0] + tokens_per_chunk - 1) / tokens_per_chunk; }
};

}  // namespace pyllm

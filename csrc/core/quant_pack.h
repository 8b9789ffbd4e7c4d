// From the rows of GGUF tensors to a QuantMatrix.
#pragma once
#include <vector>

#include "core/gguf_blocks.h"
#include "core/quant_matrix.h"

namespace pyllm {

// `rows` rows of blocks at `data`, row after row as in the file.
struct GgmlRows {
  const uint8_t* data;
  int64_t rows;
};

// Writes the rows of all sources, one after the other, to `out` (matrix.bytes() bytes, aligned to
// 64). The caller has checked sizes. Uses all threads; must not be called while capturing.
void pack_ggml(const std::vector<GgmlRows>& sources, GgmlType type, const QuantMatrix& matrix,
               uint8_t* out);

}  // namespace pyllm

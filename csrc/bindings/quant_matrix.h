// The arguments of a QuantTensor, checked: every binding that reads one starts with this.
#pragma once
#include "bindings/bindings.h"
#include "core/quant_fragments.h"
#include "core/quant_matrix.h"

namespace pyllm {

// Throws unless it is a format that we have, of a matrix [n, k].
QuantFragments quant_fragments(const Check& c, int64_t n, int64_t k, int bits, int group_size,
                               bool has_minimum);
// Throws unless these are so many contiguous bytes.
void check_bytes(const Check& c, const Tensor& packed, int64_t bytes);

// Throws unless `packed` has exactly the bytes that the format says.
QuantMatrix quant_matrix(const Check& c, const Tensor& packed, int64_t n, int64_t k, int bits,
                         int group_size, bool has_minimum);

}  // namespace pyllm

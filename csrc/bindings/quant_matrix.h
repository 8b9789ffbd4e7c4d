// The arguments of a QuantTensor, checked: every binding that reads one starts with this.
#pragma once
#include "bindings/bindings.h"
#include "core/quant_matrix.h"

namespace pyllm {

// Throws unless `packed` has exactly the bytes that the format says.
QuantMatrix quant_matrix(const Check& c, const Tensor& packed, int64_t n, int64_t k, int bits,
                         int group_size, bool has_minimum);

}  // namespace pyllm

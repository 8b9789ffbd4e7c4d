// Host-side helpers of launchers.
#pragma once
#include "core/half.h"
#include "core/tensor.h"
#include "cuda/kernels.h"

namespace pyllm::cuda {

// Calls f with a value of the C++ type; the binding has checked that it is one of these.
template <class F>
Status dispatch_float(DType dtype, F f) {
  switch (dtype) {
    case DType::F32: return f(float{});
    case DType::F16: return f(f16{});
    case DType::BF16: return f(bf16{});
    default: return "internal error: expected float32, float16 or bfloat16";
  }
}

// Whether every row of the tensor can be accessed in vectors of N values.
template <int N>
bool aligned(const Tensor& t) {
  const int bytes = item_size(t.dtype) * N;
  if (reinterpret_cast<uintptr_t>(t.data) % (bytes > 16 ? 16 : bytes)) return false;
  for (int i = 0; i + 1 < t.ndim; ++i)
    if (t.shape[i] > 1 && t.stride[i] % N) return false;
  return true;
}

}  // namespace pyllm::cuda

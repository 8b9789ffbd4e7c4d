// What ops write to, allocated here rather than in Python, where that takes longer than a small
// kernel: from torch, or from the arena that is in use (pyllm/ops/alloc.py).
#pragma once
#include <cstdlib>
#include <memory>

#include "bindings/python_tensor.h"

namespace pyllm {

struct Output {
  pybind11::object object;
  Tensor tensor;
};

// `given`, or if that is None an uninitialized contiguous tensor of the dtype of `x` and, but for
// its last dimension, of its shape. `like` is what was read of `x`.
Output output_rows(pybind11::handle given, pybind11::handle x, const Tensor& like, int64_t width);

inline Output output_like(pybind11::handle given, pybind11::handle x, const Tensor& like) {
  return output_rows(given, x, like, like.ndim ? like.shape[like.ndim - 1] : 1);
}

// Uninitialized memory between two launches of one call. While a plan is captured it belongs to the
// plan, as any output does.
struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;
struct Scratch {
  pybind11::object object;
  Memory own;
  Tensor tensor;  // uint8 [rows, row_bytes]
};
Scratch scratch(int64_t rows, int64_t row_bytes);

}  // namespace pyllm

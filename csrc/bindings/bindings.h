// What every binding needs. A binding is: checks, early return, launch.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>

#include "bindings/fast_call.h"
#include "bindings/output.h"
#include "bindings/python_tensor.h"
#include "core/check.h"
#include "core/launch.h"
#include "core/plan.h"
#include "cpu/kernels.h"

namespace pyllm {

namespace py = pybind11;

// Without the GIL; a third of the time that pybind11 takes to release it.
struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

// Runs (or records, while capturing) the launches in order, without the GIL.
inline void run(const Launch& launch) {
  const WithoutGil without;
  submit(&launch, 1);
}
template <class... Launches>
void run(const Launches&... launches) {
  const WithoutGil without;
  const Launch all[] = {launches...};
  submit(all, std::size(all));
}

// [D] as [1, D]; anything else as it is.
inline Tensor with_rows(Tensor t) {
  if (t.ndim != 1) return t;
  t.ndim = 2;
  t.shape[1] = t.shape[0];
  t.stride[1] = t.stride[0];
  t.shape[0] = 1;
  t.stride[0] = 0;
  return t;
}

// [..., D] as [T, D] where that is the same memory; anything else as it is.
inline Tensor as_rows(Tensor t) {
  t = with_rows(t);
  for (; t.ndim > 2; --t.ndim) {
    if (t.shape[0] > 1 && t.stride[0] != t.shape[1] * t.stride[1] && t.numel() != 0) return t;
    t.shape[0] *= t.shape[1];
    std::copy(t.shape + 2, t.shape + t.ndim, t.shape + 1);
    std::copy(t.stride + 1, t.stride + t.ndim, t.stride);
  }
  return t;
}

// [T, D] as [T, 1, D], [D] as [1, 1, D]; anything else as it is.
inline Tensor with_heads(Tensor t) {
  t = with_rows(t);
  if (t.ndim != 2) return t;
  t.ndim = 3;
  t.shape[2] = t.shape[1];
  t.stride[2] = t.stride[1];
  t.shape[1] = 1;
  t.stride[1] = 0;
  return t;
}

// [T, H, D] as [T H, 1, D] where that is the same memory for all: rows are then shared out among
// threads also where T is small. Undefined tensors stay so.
inline void merge_heads(std::initializer_list<Tensor*> tensors) {
  for (const Tensor* t : tensors)
    if (t->defined() &&
        (t->shape[1] == 1 || (t->shape[0] > 1 && t->stride[0] != t->shape[1] * t->stride[1])))
      return;
  for (Tensor* t : tensors) {
    if (!t->defined()) continue;
    t->shape[0] *= t->shape[1];
    t->stride[0] = t->stride[1];
    t->shape[1] = 1;
  }
}

// Checks the bytes of a QuantActivation of K values a row.
inline void check_quantized(Check& c, const Tensor& q, const char* name, int64_t k,
                            int group_size) {
  c.require((group_size == 16 || group_size == 32) && k > 0 && k % group_size == 0, name,
            ": expected K to be a multiple of the group size ", group_size, ", got ", k);
  const int64_t row_bytes = ActivationLayout{k, group_size}.row_bytes();
  c(q, name, "T _", {DType::U8});
  c.require(q.shape[1] == row_bytes, name, ": expected rows of ", row_bytes, " bytes, got ", q);
}

// Rows of `width` elements a chunk, so that a chunk is worth a few microseconds: short enough to
// balance, long enough not to be lost in the counting.
inline int64_t rows_per_chunk(int64_t rows, int64_t width) {
  return std::clamp<int64_t>(8192 / std::max<int64_t>(width, 1), 1, std::max<int64_t>(rows, 1));
}

}  // namespace pyllm

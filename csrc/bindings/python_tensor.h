// From a torch.Tensor (or None) to a pyllm::Tensor, through DLPack's C ABI or the tensor's Python
// attributes: we include no torch header and link no torch library, so one build serves every torch
// release.
#pragma once
#include <pybind11/pybind11.h>

#include "core/tensor.h"

namespace pyllm {
// A new reference from Python's C API; throws the exception that it set if there is none.
inline pybind11::object owned(PyObject* object) {
  if (!object) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(object);
}
// Throws a TypeError unless `object` is a dense tensor with memory, of a dtype that we know, on the
// CPU unless `any_device`.
Tensor tensor_from_python(pybind11::handle object, bool any_device = false);
// Whether plain tensors are read through DLPack where torch has it, as they are unless a test says
// otherwise; returns what was so before.
bool use_dlpack(bool enabled);
// Throws py::type_error unless `object` is a torch.dtype that we know.
DType dtype_from_python(pybind11::handle object);
pybind11::handle dtype_to_python(DType dtype);
}  // namespace pyllm

namespace pybind11::detail {
template <>
struct type_caster<pyllm::Tensor> {
  PYBIND11_TYPE_CASTER(pyllm::Tensor, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    value = source.is_none() ? pyllm::Tensor{} : pyllm::tensor_from_python(source);
    return true;
  }
};
}  // namespace pybind11::detail

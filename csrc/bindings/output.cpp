#include "bindings/output.h"

#include <algorithm>
#include <new>

#include "bindings/bindings.h"

namespace pyllm {
namespace {

thread_local bool arena_in_use = false;

py::object from_arena(const int64_t* shape, int ndim, DType dtype) {
  static const py::object& empty =
      *new py::object(py::module_::import("pyllm.ops.alloc").attr("empty"));
  py::tuple sizes(ndim);
  for (int i = 0; i < ndim; ++i) sizes[i] = shape[i];
  return empty(sizes, dtype_to_python(dtype));
}

bool is_contiguous(const Tensor& t) {
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; stride *= t.shape[i--])
    if (t.shape[i] != 1 && t.stride[i] != stride) return false;
  return true;
}

// Either takes half the time in which PyTorch parses a tuple of sizes.
py::object from_torch(py::handle x, const Tensor& like, const int64_t* shape) {
  static PyObject* const empty_like =
      py::object(py::module_::import("torch").attr("empty_like")).release().ptr();
  static PyObject* const new_empty = PyUnicode_InternFromString("new_empty");
  if (is_contiguous(like) && std::equal(shape, shape + like.ndim, like.shape))
    return owned(PyObject_CallOneArg(empty_like, x.ptr()));
  PyObject* arguments[kMaxDims + 1] = {x.ptr()};
  py::object sizes[kMaxDims];
  for (int i = 0; i < like.ndim; ++i) {
    sizes[i] = owned(PyLong_FromLongLong(shape[i]));
    arguments[i + 1] = sizes[i].ptr();
  }
  return owned(PyObject_VectorcallMethod(new_empty, arguments, like.ndim + 1, nullptr));
}

}  // namespace

Output output_rows(py::handle given, py::handle x, const Tensor& like, int64_t width) {
  if (!given.is_none())
    return {py::reinterpret_borrow<py::object>(given), tensor_from_python(given)};
  int64_t shape[kMaxDims];
  std::copy_n(like.shape, like.ndim, shape);
  if (like.ndim) shape[like.ndim - 1] = width;
  py::object made =
      arena_in_use ? from_arena(shape, like.ndim, like.dtype) : from_torch(x, like, shape);
  const Tensor tensor = tensor_from_python(made);
  return {std::move(made), tensor};
}

Scratch scratch(int64_t rows, int64_t row_bytes) {
  const int64_t shape[] = {rows, row_bytes}, bytes = rows * row_bytes;
  if (arena_in_use) {
    py::object made = from_arena(shape, 2, DType::U8);
    const Tensor tensor = tensor_from_python(made);
    return {std::move(made), nullptr, tensor};
  }
  // What a row or two need is kept from call to call.
  constexpr int64_t kKept = 64 * 1024, kAlign = 64;
  static thread_local Memory kept;
  const auto allocate = [](int64_t size) {
    Memory memory{std::aligned_alloc(kAlign, (size + kAlign - 1) / kAlign * kAlign)};
    if (!memory) throw std::bad_alloc();
    return memory;
  };
  Scratch s;
  if (bytes > kKept)
    s.own = allocate(bytes);
  else if (!kept)
    kept = allocate(kKept);
  s.tensor.data = (s.own ? s.own : kept).get();
  s.tensor.dtype = DType::U8;
  s.tensor.ndim = 2;
  std::copy_n(shape, 2, s.tensor.shape);
  s.tensor.stride[0] = row_bytes, s.tensor.stride[1] = 1;
  return s;
}

void register_output(py::module_& m) {
  m.def("use_arena", [](bool in_use) { arena_in_use = in_use; });
}

}  // namespace pyllm

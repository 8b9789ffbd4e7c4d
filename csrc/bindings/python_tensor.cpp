#include "bindings/python_tensor.h"

#include <algorithm>
#include <string>

#include "core/plan.h"

namespace py = pybind11;

namespace pyllm {
namespace {

// Attribute names and the torch.dtype objects, looked up once. Never freed: they live as long as
// the interpreter.
struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* dtypes[std::size(kDTypeNames)];
  Names() {
    py::module_ torch = py::module_::import("torch");
    for (size_t i = 0; i < std::size(kDTypeNames); ++i)
      dtypes[i] = py::object(torch.attr(kDTypeNames[i])).release().ptr();
  }
};

// While a plan is captured every torch function may pass through Python code that checks it; what
// is read here needs no check, and there are thousands of reads in a step.
class NoTorchFunction {
 public:
  NoTorchFunction() {
    if (!capturing()) return;
    static const py::object* type =
        new py::object(py::module_::import("torch").attr("_C").attr("DisableTorchFunction"));
    guard_ = (*type)();
    guard_.attr("__enter__")();
  }
  ~NoTorchFunction() {
    if (!guard_) return;
    py::error_scope pending;
    guard_.attr("__exit__")(py::none(), py::none(), py::none());
  }

 private:
  py::object guard_;
};

py::object owned(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

void read_sizes(const py::object& tuple, int64_t* out, int ndim) {
  for (int i = 0; i < ndim; ++i) {
    out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
    if (out[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
}

const Names& names_of_torch() {
  static const Names* names = new Names;
  return *names;
}

}  // namespace

DType dtype_from_python(py::handle object) {
  const auto& dtypes = names_of_torch().dtypes;
  const auto found = std::find(std::begin(dtypes), std::end(dtypes), object.ptr());
  if (found == std::end(dtypes))
    throw py::type_error("expected a dtype that pyllm knows, got " + std::string(py::str(object)));
  return static_cast<DType>(found - std::begin(dtypes));
}

Tensor tensor_from_python(py::handle object, bool any_device) {
  const Names* names = &names_of_torch();
  const auto type_error = [&](const std::string& expected) {
    return py::type_error("expected " + expected + ", got " +
                          std::string(py::str(py::type::of(object))));
  };
  const NoTorchFunction guard;
  PyObject* dtype_object = PyObject_GetAttr(object.ptr(), names->dtype);
  if (!dtype_object) {
    PyErr_Clear();
    throw type_error("a torch.Tensor");
  }
  const py::object dtype = owned(dtype_object);
  Tensor t;
  t.dtype = dtype_from_python(dtype);
  const py::object is_cpu = owned(PyObject_GetAttr(object.ptr(), names->is_cpu));
  if (!any_device && is_cpu.ptr() != Py_True)
    throw py::type_error("expected a CPU tensor, got one on " +
                         std::string(py::str(object.attr("device"))));
  const py::object shape = owned(PyObject_GetAttr(object.ptr(), names->shape));
  const py::object stride = owned(PyObject_CallMethodNoArgs(object.ptr(), names->stride));
  if (!PyTuple_Check(shape.ptr()) || !PyTuple_Check(stride.ptr()))
    throw type_error("a torch.Tensor");
  t.ndim = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
  if (t.ndim > kMaxDims)
    throw py::type_error("expected at most " + std::to_string(kMaxDims) + " dimensions, got " +
                         std::to_string(t.ndim));
  read_sizes(shape, t.shape, t.ndim);
  read_sizes(stride, t.stride, t.ndim);
  t.data = PyLong_AsVoidPtr(owned(PyObject_CallMethodNoArgs(object.ptr(), names->data_ptr)).ptr());
  if (!t.data && PyErr_Occurred()) throw py::error_already_set();
  return t;
}

}  // namespace pyllm

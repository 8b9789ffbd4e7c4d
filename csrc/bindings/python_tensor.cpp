#include "bindings/python_tensor.h"

#include <algorithm>
#include <string>
#include <utility>

#include "bindings/dlpack.h"
#include "core/plan.h"

namespace py = pybind11;

namespace pyllm {
namespace {

// What is looked up in torch once. Never freed: it lives as long as the interpreter.
struct Torch {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* dtypes[std::size(kDTypeNames)];
  PyTypeObject *tensor, *parameter;
  int (*from_python)(void*, dlpack::Tensor*);  // null if this torch is too old to have it

  Torch() {
    py::module_ torch = py::module_::import("torch");
    for (size_t i = 0; i < std::size(kDTypeNames); ++i)
      dtypes[i] = py::object(torch.attr(kDTypeNames[i])).release().ptr();
    const auto type = [](py::object object) {
      return reinterpret_cast<PyTypeObject*>(object.release().ptr());
    };
    tensor = type(torch.attr("Tensor"));
    parameter = type(torch.attr("nn").attr("Parameter"));
    from_python = exchange(torch.attr("Tensor"));
  }

  static decltype(from_python) exchange(const py::object& type) {
    if (!py::hasattr(type, dlpack::kAttribute)) return nullptr;
    const py::object capsule = type.attr(dlpack::kAttribute);
    if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)) return nullptr;
    auto* api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
    while (api && api->version.major != dlpack::kMajor) api = api->previous;
    return api ? api->from_python : nullptr;
  }
};

constexpr dlpack::DataType kDataTypes[] = {
    {dlpack::kFloat, 32, 1}, {dlpack::kBfloat, 16, 1}, {dlpack::kFloat, 16, 1},
    {dlpack::kFloat, 64, 1}, {dlpack::kInt, 8, 1},     {dlpack::kUInt, 8, 1},
    {dlpack::kInt, 32, 1},   {dlpack::kInt, 64, 1},    {dlpack::kBool, 8, 1},
    {dlpack::kE4M3FN, 8, 1},
};
static_assert(std::size(kDataTypes) == std::size(kDTypeNames));

bool dlpack_enabled = true;

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

void read_sizes(const py::object& tuple, int64_t* out, int ndim) {
  for (int i = 0; i < ndim; ++i) {
    out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
    if (out[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
}

const Torch& torch() {
  static const Torch* found = new Torch;
  return *found;
}

py::type_error unexpected(const std::string& expected, py::handle object) {
  return py::type_error("expected " + expected + ", got " +
                        std::string(py::str(py::type::of(object))));
}

// Reads plain tensors, twenty times as fast as their attributes are read. False for anything else,
// and for what DLPack does not describe: the attributes then say what is wrong.
bool read_dlpack(PyObject* object, bool any_device, Tensor& t) {
  const Torch& known = torch();
  if (!known.from_python || !dlpack_enabled) return false;
  if (Py_TYPE(object) != known.tensor && Py_TYPE(object) != known.parameter) return false;
  dlpack::Tensor lent;
  if (known.from_python(object, &lent) != 0) {
    PyErr_Clear();
    return false;
  }
  if (!any_device && lent.device.type != dlpack::kCpu) return false;
  if (lent.ndim < 0 || lent.ndim > kMaxDims) return false;
  const auto dtype =
      std::find_if(std::begin(kDataTypes), std::end(kDataTypes), [&](dlpack::DataType d) {
        return d.code == lent.dtype.code && d.bits == lent.dtype.bits &&
               d.lanes == lent.dtype.lanes;
      });
  if (dtype == std::end(kDataTypes)) return false;
  t.data = static_cast<char*>(lent.data) + lent.byte_offset;
  t.dtype = static_cast<DType>(dtype - std::begin(kDataTypes));
  t.ndim = lent.ndim;
  std::copy_n(lent.shape, lent.ndim, t.shape);
  std::copy_n(lent.strides, lent.ndim, t.stride);
  return true;
}

// Reads anything that has the attributes of a torch.Tensor.
void read_attributes(py::handle object, bool any_device, Tensor& t) {
  const Torch& names = torch();
  const NoTorchFunction guard;
  PyObject* dtype_object = PyObject_GetAttr(object.ptr(), names.dtype);
  if (!dtype_object) {
    PyErr_Clear();
    throw unexpected("a torch.Tensor", object);
  }
  const py::object dtype = owned(dtype_object);
  t.dtype = dtype_from_python(dtype);
  const py::object is_cpu = owned(PyObject_GetAttr(object.ptr(), names.is_cpu));
  if (!any_device && is_cpu.ptr() != Py_True)
    throw py::type_error("expected a CPU tensor, got one on " +
                         std::string(py::str(object.attr("device"))));
  const py::object shape = owned(PyObject_GetAttr(object.ptr(), names.shape));
  const py::object stride = owned(PyObject_CallMethodNoArgs(object.ptr(), names.stride));
  if (!PyTuple_Check(shape.ptr()) || !PyTuple_Check(stride.ptr()))
    throw unexpected("a torch.Tensor", object);
  t.ndim = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
  if (t.ndim > kMaxDims)
    throw py::type_error("expected at most " + std::to_string(kMaxDims) + " dimensions, got " +
                         std::to_string(t.ndim));
  read_sizes(shape, t.shape, t.ndim);
  read_sizes(stride, t.stride, t.ndim);
  t.data = PyLong_AsVoidPtr(owned(PyObject_CallMethodNoArgs(object.ptr(), names.data_ptr)).ptr());
  if (!t.data && PyErr_Occurred()) throw py::error_already_set();
}

// Tensors whose storage is elsewhere (FakeTensor, wrappers of functorch) or was freed have no
// address, or their offset in nothing for one; no system maps its first pages.
constexpr uintptr_t kLowestAddress = 65536;

}  // namespace

DType dtype_from_python(py::handle object) {
  const auto& dtypes = torch().dtypes;
  const auto found = std::find(std::begin(dtypes), std::end(dtypes), object.ptr());
  if (found == std::end(dtypes))
    throw py::type_error("expected a dtype that pyllm knows, got " + std::string(py::str(object)));
  return static_cast<DType>(found - std::begin(dtypes));
}

py::handle dtype_to_python(DType dtype) { return torch().dtypes[static_cast<int>(dtype)]; }

Tensor tensor_from_python(py::handle object, bool any_device) {
  constexpr const char* kExpected = "a dense torch.Tensor that has memory";
  Tensor t;
  if (!read_dlpack(object.ptr(), any_device, t)) {
    try {
      read_attributes(object, any_device, t);
    } catch (py::error_already_set& error) {
      py::raise_from(error, PyExc_TypeError, unexpected(kExpected, object).what());
      throw py::error_already_set();
    }
  }
  if (reinterpret_cast<uintptr_t>(t.data) < kLowestAddress && t.numel() != 0)
    throw unexpected(kExpected, object);
  return t;
}

bool use_dlpack(bool enabled) { return std::exchange(dlpack_enabled, enabled); }

}  // namespace pyllm

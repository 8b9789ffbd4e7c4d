// Which way a call of an op takes, asked before every one: Python code that asks the same takes
// longer than a small kernel.
#include "bindings/bindings.h"

namespace pyllm {
namespace {

enum Route {
  kPlain,      // plain tensors on the CPU, and no backend was asked for: the CPU's own
  kChosen,     // as the backend and the rules say
  kDispatched  // through PyTorch's dispatcher, which has a say
};

// Names of torch._C that PyTorch may change: where it has, every call takes the way that is right
// for all, through the dispatcher.
constexpr const char* kStates[] = {"_are_functorch_transforms_active", "_len_torch_dispatch_stack",
                                   "_is_any_autocast_enabled"};

thread_local bool backend_in_use = false;

PyObject* kept(py::object object) { return object.release().ptr(); }

// What is looked up once. Never freed: it lives as long as the interpreter.
struct Lookups {
  PyObject *states[std::size(kStates)], *is_grad_enabled, *requires_grad, *is_cpu;
  PyObject *tensor, *parameter, *environment, *variable;
  bool complete = true;

  Lookups() {
    const py::module_ torch = py::module_::import("torch");
    const py::object c = torch.attr("_C"), environ = py::module_::import("os").attr("environ");
    for (size_t i = 0; i < std::size(kStates); ++i) {
      complete &= py::hasattr(c, kStates[i]);
      if (complete) states[i] = kept(c.attr(kStates[i]));
    }
    is_grad_enabled = kept(torch.attr("is_grad_enabled"));
    tensor = kept(torch.attr("Tensor"));
    parameter = kept(torch.attr("nn").attr("Parameter"));
    requires_grad = PyUnicode_InternFromString("requires_grad");
    is_cpu = PyUnicode_InternFromString("is_cpu");
    // The dictionary behind os.environ, whose own lookup raises and catches errors.
    environment = kept(environ.attr("_data"));
    variable = kept(environ.attr("encodekey")("PYLLM_BACKEND"));
  }
};

const Lookups& lookups() {
  static const Lookups& found = *new Lookups;
  return found;
}

bool checked(int value) {
  if (value < 0) throw py::error_already_set();
  return value != 0;
}

bool truth(PyObject* reference) { return checked(PyObject_IsTrue(owned(reference).ptr())); }

// Whether PyTorch has to know of a call with these arguments for more than its derivative.
bool needs_tracing(PyObject* const* arguments, Py_ssize_t n) {
  const Lookups& known = lookups();
  if (!known.complete) return true;
  for (PyObject* state : known.states)
    if (truth(PyObject_CallNoArgs(state))) return true;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* x = arguments[i];
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
    if (x != Py_None && type != known.tensor && type != known.parameter &&
        checked(PyObject_IsInstance(x, known.tensor)))
      return true;
  }
  return false;
}

bool needs_dispatcher(PyObject* const* tensors, Py_ssize_t n) {
  if (needs_tracing(tensors, n)) return true;
  const Lookups& known = lookups();
  if (!truth(PyObject_CallNoArgs(known.is_grad_enabled))) return false;
  for (Py_ssize_t i = 0; i < n; ++i)
    if (tensors[i] != Py_None && checked(PyObject_IsInstance(tensors[i], known.tensor)) &&
        truth(PyObject_GetAttr(tensors[i], known.requires_grad)))
      return true;
  return false;
}

bool backend_asked_for(PyObject* backend) {
  const Lookups& known = lookups();
  return backend != Py_None || backend_in_use ||
         checked(PyDict_Contains(known.environment, known.variable));
}

bool is_plain_on_cpu(PyObject* x) {
  const Lookups& known = lookups();
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
  return (type == known.tensor || type == known.parameter) &&
         truth(PyObject_GetAttr(x, known.is_cpu));
}

// needs_dispatcher(*tensors)
PyObject* call_needs_dispatcher(PyObject*, PyObject* const* args, Py_ssize_t n) {
  return fast_call::guarded([&] { return PyBool_FromLong(needs_dispatcher(args, n)); });
}

// needs_tracing(*arguments)
PyObject* call_needs_tracing(PyObject*, PyObject* const* args, Py_ssize_t n) {
  return fast_call::guarded([&] { return PyBool_FromLong(needs_tracing(args, n)); });
}

// route(backend, *tensors)
PyObject* call_route(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n < 2) return PyErr_Format(PyExc_TypeError, "expected a backend and tensors");
  return fast_call::guarded([&] {
    if (needs_dispatcher(args + 1, n - 1)) return PyLong_FromLong(kDispatched);
    const bool plain = !backend_asked_for(args[0]) && is_plain_on_cpu(args[1]);
    return PyLong_FromLong(plain ? kPlain : kChosen);
  });
}

}  // namespace

void register_route(py::module_& m) {
  fast_call::add<&call_needs_dispatcher>(m, "needs_dispatcher");
  fast_call::add<&call_needs_tracing>(m, "needs_tracing");
  fast_call::add<&call_route>(m, "route");
  m.attr("PLAIN") = static_cast<int>(kPlain);
  m.attr("DISPATCHED") = static_cast<int>(kDispatched);
  m.def("use_backend", [](bool in_use) { backend_in_use = in_use; });
}

}  // namespace pyllm

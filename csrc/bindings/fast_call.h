// Functions for Python that take arguments by position, and return a py::object or nothing, without
// the half microsecond in which pybind11 looks for the overload to call. For ops that are called on
// a few values.
#pragma once
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "bindings/python_tensor.h"

namespace pyllm {
namespace fast_call {

template <class T>
T from_python(PyObject* object) {
  if constexpr (std::is_same_v<T, Tensor>) {
    return object == Py_None ? Tensor{} : tensor_from_python(object);
  } else if constexpr (std::is_same_v<T, pybind11::handle>) {
    return object;
  } else if constexpr (std::is_same_v<T, std::string>) {
    const char* text = PyUnicode_AsUTF8(object);
    if (!text) throw pybind11::error_already_set();
    return text;
  } else if constexpr (std::is_floating_point_v<T>) {
    const double value = PyFloat_AsDouble(object);
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return static_cast<T>(value);
  } else if constexpr (std::is_same_v<T, bool>) {
    const int value = PyObject_IsTrue(object);
    if (value < 0) throw pybind11::error_already_set();
    return value != 0;
  } else {
    static_assert(std::is_integral_v<T>);
    const long long value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    if (value != static_cast<T>(value)) throw pybind11::value_error("an integer is too large");
    return static_cast<T>(value);
  }
}

// What `call` returns; null, with the exception in Python, where it throws.
template <class Call>
PyObject* guarded(Call call) {
  try {
    return call();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const pybind11::builtin_exception& error) {
    error.set_error();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// Makes `Function`, which Python's own calling convention calls, an attribute of the module.
template <PyObject* (*Function)(PyObject*, PyObject* const*, Py_ssize_t)>
void add(pybind11::module_& m, const char* name) {
  static PyMethodDef definition{};
  auto* call = reinterpret_cast<void (*)()>(Function);
  definition = {name, reinterpret_cast<PyCFunction>(call), METH_FASTCALL, nullptr};
  m.add_object(name, pybind11::reinterpret_steal<pybind11::object>(
                         PyCFunction_NewEx(&definition, m.ptr(), nullptr)));
}

template <auto Function>
struct Method;

template <class Result, class... Args, Result (*Function)(Args...)>
struct Method<Function> {
  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t n) {
    if (n != sizeof...(Args))
      return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd",
                          static_cast<int>(sizeof...(Args)), n);
    return guarded([&] {
      return [&]<size_t... i>(std::index_sequence<i...>) {
        std::tuple<std::remove_cvref_t<Args>...> values{
            from_python<std::remove_cvref_t<Args>>(args[i])...};
        if constexpr (std::is_void_v<Result>) {
          std::apply(Function, values);
          return pybind11::none().release().ptr();
        } else {
          return std::apply(Function, values).release().ptr();
        }
      }(std::index_sequence_for<Args...>{});
    });
  }
};

}  // namespace fast_call

// Makes Function an attribute of the module.
template <auto Function>
void def_fast(pybind11::module_& m, const char* name) {
  fast_call::add<&fast_call::Method<Function>::call>(m, name);
}

}  // namespace pyllm

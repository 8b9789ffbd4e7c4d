// The checks of core/check.h for kernels that have no binding of their own.
#include <vector>

#include "bindings/bindings.h"

namespace pyllm {
namespace {

const char* text(const py::object& string) {
  const char* chars = PyUnicode_AsUTF8(string.ptr());
  if (!chars) throw py::error_already_set();
  return chars;
}

// One line an argument: (tensor or None, name, shape, dtype or several). None always passes.
void check(const char* op, const py::list& arguments) {
  Check c(op);
  for (const py::handle argument : arguments) {
    const auto line = argument.cast<py::tuple>();
    const py::object object = line[0], allowed = line[3];
    if (object.is_none()) continue;
    std::vector<DType> dtypes;
    if (py::isinstance<py::tuple>(allowed)) {
      for (const py::handle dtype : allowed) dtypes.push_back(dtype_from_python(dtype));
    } else {
      dtypes.push_back(dtype_from_python(allowed));
    }
    // The strings live as long as the list: so do the names of dimensions.
    c(tensor_from_python(object, true), text(line[1]), text(line[2]), dtypes.data(), dtypes.size());
  }
}

}  // namespace

void register_check(py::module_& m) {
  m.def("check", &check);
  m.def("use_dlpack", &use_dlpack);
}

}  // namespace pyllm

// The plan, the thread pool and what there is to know about the processor.
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "core/huge_pages.h"
#include "core/plan.h"
#include "core/thread_pool.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace pyllm {

void register_runtime(py::module_& m) {
  py::class_<Plan>(m, "Plan")
      .def(py::init<>())
      .def("begin", &Plan::begin)
      .def("end", &Plan::end)
      .def("replay", &Plan::replay, py::call_guard<py::gil_scoped_release>())
      .def("profile", &Plan::profile, py::arg("repeats"), py::call_guard<py::gil_scoped_release>())
      .def("names", &Plan::names)
      .def("__len__", &Plan::size);
  m.def("capturing", &capturing);
  m.def("num_threads", [] { return ThreadPool::get().size(); });
  m.def("set_num_threads", [](int n) {
    if (n < 1 || n > 1024)
      throw ArgumentError("set_num_threads: expected 1 to 1024 threads, got " + std::to_string(n));
    py::gil_scoped_release release;
    ThreadPool::get().resize(n);
  });
  m.def("advise_huge_pages", [](const py::buffer& memory) {
    const py::buffer_info info = memory.request(true);
    advise_huge_pages(info.ptr, info.size * info.itemsize);
  });
  m.def("populate", [](const py::buffer& memory) {
    const py::buffer_info info = memory.request(true);
    py::gil_scoped_release release;
    populate(info.ptr, info.size * info.itemsize);
  });
  m.def("trim_heap", [] {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
  });
  m.def("isa", [] { return kIsaNames[static_cast<int>(selected_isa())]; });
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.emplace_back(kIsaNames[static_cast<int>(isa)]);
    return names;
  });
}

}  // namespace pyllm

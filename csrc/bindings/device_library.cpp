#include "bindings/device_library.h"

#include <dlfcn.h>

#include <mutex>

namespace pyllm {

DeviceLibrary::DeviceLibrary(const std::string& path, bool emulated)
    : path_(path), handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)), emulated_(emulated) {
  if (!handle_) throw std::runtime_error(dlerror());
  kernels_ = reinterpret_cast<const cuda::Kernels* (*)()>(symbol("pyllm_cuda_kernels"))();
}

void* DeviceLibrary::symbol(const char* name) const {
  void* found = dlsym(handle_, name);
  if (!found) throw std::runtime_error(path_ + " has no " + name);
  return found;
}

void DeviceLibrary::launch(const std::function<const char*()>& call,
                           std::initializer_list<Named> tensors) {
  const char* error;
  {
    py::gil_scoped_release release;
    if (emulated_) {
      static std::mutex one_at_a_time;  // the registered memory is of one launch
      std::lock_guard lock(one_at_a_time);
      static const auto add =
          reinterpret_cast<void (*)(const void*, size_t, const char*)>(symbol("emulator_register"));
      static const auto clear = reinterpret_cast<void (*)()>(symbol("emulator_unregister_all"));
      clear();
      for (const auto& [name, t] : tensors) {
        if (!t.data || t.numel() == 0) continue;
        int64_t last = 0;
        for (int i = 0; i < t.ndim; ++i) last += (t.shape[i] - 1) * t.stride[i];
        add(t.data, static_cast<size_t>((last + 1) * item_size(t.dtype)), name);
      }
      error = call();
    } else {
      error = call();
    }
  }
  if (error) throw std::runtime_error(error);
}

void DeviceLibrary::configure(uint64_t seed, int threads) {
  reinterpret_cast<void (*)(uint64_t, int)>(symbol("emulator_configure"))(seed, threads);
}

std::string DeviceLibrary::report() {
  return reinterpret_cast<const char* (*)()>(symbol("emulator_report"))();
}

void register_cuda_flash_attention(DeviceLibraryClass& c);
void register_cuda_paged_attention(DeviceLibraryClass& c);
void register_cuda_quant_matmul(DeviceLibraryClass& c);
void register_cuda_norm(DeviceLibraryClass& c);

void register_device_library(py::module_& m) {
  DeviceLibraryClass c(m, "DeviceLibrary");
  c.def(py::init<const std::string&, bool>(), py::arg("path"), py::arg("emulated"))
      .def("configure", &DeviceLibrary::configure, py::arg("seed"), py::arg("threads"))
      .def("report", &DeviceLibrary::report);
  register_cuda_flash_attention(c);
  register_cuda_paged_attention(c);
  register_cuda_quant_matmul(c);
  register_cuda_norm(c);
}

}  // namespace pyllm

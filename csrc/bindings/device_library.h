// What the bindings of CUDA kernels need. They serve the device and the emulator alike: both are
// libraries with the same table of launchers, loaded when first asked for.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "cuda/kernels.h"

namespace pyllm {

// A tensor of the device that a library's kernels run on.
struct DeviceTensor : Tensor {};

class DeviceLibrary {
 public:
  DeviceLibrary(const std::string& path, bool emulated);

  // Runs a launcher without the GIL; what it reports becomes an exception. `tensors` are all that
  // the kernels may touch, by the names that errors and reports give them.
  struct Named {
    const char* name;
    const Tensor& tensor;
  };
  template <class Args>
  void run(cuda::Status (*cuda::Kernels::*launcher)(const Args&, cuda::Stream), const Args& args,
           uintptr_t stream, std::initializer_list<Named> tensors) {
    launch([&] { return (kernels_->*launcher)(args, reinterpret_cast<cuda::Stream>(stream)); },
           tensors);
  }

  // Of the emulator only.
  void configure(uint64_t seed, int threads);
  std::string report();

 private:
  void launch(const std::function<const char*()>& call, std::initializer_list<Named> tensors);
  void* symbol(const char* name) const;

  std::string path_;
  void* handle_;
  bool emulated_;
  const cuda::Kernels* kernels_;
};

using DeviceLibraryClass = py::class_<DeviceLibrary>;

}  // namespace pyllm

namespace pybind11::detail {
template <>
struct type_caster<pyllm::DeviceTensor> {
  PYBIND11_TYPE_CASTER(pyllm::DeviceTensor, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    value = {source.is_none() ? pyllm::Tensor{} : pyllm::tensor_from_python(source, true)};
    return true;
  }
};
}  // namespace pybind11::detail

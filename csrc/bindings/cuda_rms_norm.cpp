#include "bindings/device_library.h"

namespace pyllm {
namespace {

void cuda_rms_norm(DeviceLibrary& library, DeviceTensor x, DeviceTensor weight, float eps,
                   DeviceTensor residual, DeviceTensor y, DeviceTensor residual_out,
                   uintptr_t stream) {
  for (DeviceTensor* t : {&x, &residual, &y, &residual_out}) *t = {with_heads(*t)};
  Check c("rms_norm");
  c(x, "x", "T H D", kFloats);
  c(weight, "weight", "D", kFloats);
  c.optional(residual, "residual", "T H D", {x.dtype});
  c.optional(residual_out, "residual_out", "T H D", {x.dtype});
  c.require(residual.defined() == residual_out.defined(),
            "residual and residual_out come together");
  c(y, "out", "T H D", {x.dtype});
  c.require(x.numel() < int64_t{1} << 31,
            "x: expected fewer than 2^31 elements, got " + describe(x));
  if (x.numel() == 0) return;
  library.run(&cuda::Kernels::rms_norm, {x, weight, residual, y, residual_out, eps}, stream,
              {{"x", x},
               {"weight", weight},
               {"residual", residual},
               {"out", y},
               {"residual_out", residual_out}});
}

}  // namespace

void register_cuda_rms_norm(DeviceLibraryClass& c) { c.def("rms_norm", &cuda_rms_norm); }

}  // namespace pyllm

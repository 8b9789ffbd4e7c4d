#include "bindings/device_library.h"

namespace pyllm {
namespace {

constexpr const char* kLimit = "expected fewer than 2^31 elements, got ";

void check_rows(Check& c, const DeviceTensor& x, const char* name) {
  c(x, name, "T H D", kFloats);
  c.require(x.numel() < int64_t{1} << 31, name, ": ", kLimit, x);
}

// y is int8 or uint8 (e4m3) if there is a scale.
template <bool Centered>
void norm(DeviceLibrary& library, DeviceTensor x, DeviceTensor weight, DeviceTensor bias, float eps,
          DeviceTensor residual, DeviceTensor y, DeviceTensor residual_out, DeviceTensor scale,
          uintptr_t stream) {
  for (DeviceTensor* t : {&x, &residual, &y, &residual_out}) *t = {with_heads(*t)};
  Check c(Centered ? "layer_norm" : "rms_norm");
  check_rows(c, x, "x");
  c.optional(weight, "weight", "D", {x.dtype, DType::F32});
  c.optional(bias, "bias", "D", {x.dtype, DType::F32});
  if (weight.defined() && bias.defined()) c.same_dtype(weight, "weight", bias, "bias");
  c.optional(residual, "residual", "T H D", {x.dtype});
  c.optional(residual_out, "residual_out", "T H D", {x.dtype});
  c.require(residual.defined() == residual_out.defined(),
            "residual and residual_out come together");
  if (scale.defined()) {
    c(y, "out", "T H D", {DType::I8, DType::U8});
    c(scale, "scale", "S", {DType::F32}, true);
    c.require(c.dim("S") == c.dim("T") * c.dim("H"), "scale: expected one for each row, got ",
              scale);
  } else {
    c(y, "out", "T H D", {x.dtype});
  }
  if (x.numel() == 0) return;
  library.run(Centered ? &cuda::Kernels::layer_norm : &cuda::Kernels::rms_norm,
              {x, weight, bias, residual, y, residual_out, scale, eps}, stream,
              {{"x", x},
               {"weight", weight},
               {"bias", bias},
               {"residual", residual},
               {"out", y},
               {"residual_out", residual_out},
               {"scale", scale}});
}

template <bool Centered>
void norm_backward(DeviceLibrary& library, DeviceTensor dy, DeviceTensor x, DeviceTensor weight,
                   float eps, DeviceTensor residual_grad, DeviceTensor dx, DeviceTensor dweight,
                   DeviceTensor dbias, DeviceTensor scratch, uintptr_t stream) {
  for (DeviceTensor* t : {&dy, &x, &residual_grad, &dx}) *t = {with_heads(*t)};
  Check c(Centered ? "layer_norm_backward" : "rms_norm_backward");
  check_rows(c, x, "x");
  c(dy, "dy", "T H D", {x.dtype});
  c.optional(weight, "weight", "D", kFloats);
  c.optional(residual_grad, "residual_grad", "T H D", {x.dtype});
  c(dx, "out", "T H D", {x.dtype});
  c(dweight, "dweight", "D", kFloats);
  c.optional(dbias, "dbias", "D", kFloats);
  if (x.numel() == 0) return;
  c(scratch, "scratch", "S", {DType::F32}, true);
  c.require(c.dim("S") >= cuda::norm_backward_scratch(c.dim("T") * c.dim("H"), c.dim("D")) &&
                reinterpret_cast<uintptr_t>(scratch.data) % 16 == 0,
            "scratch: expected more, and aligned to 16 bytes; got ", scratch);
  library.run(Centered ? &cuda::Kernels::layer_norm_backward : &cuda::Kernels::rms_norm_backward,
              {dy, x, weight, residual_grad, dx, dweight, dbias, scratch, eps}, stream,
              {{"dy", dy},
               {"x", x},
               {"weight", weight},
               {"residual_grad", residual_grad},
               {"out", dx},
               {"dweight", dweight},
               {"dbias", dbias},
               {"scratch", scratch}});
}

}  // namespace

void register_cuda_norm(DeviceLibraryClass& c) {
  c.def("rms_norm", &norm<false>)
      .def("layer_norm", &norm<true>)
      .def("rms_norm_backward", &norm_backward<false>)
      .def("layer_norm_backward", &norm_backward<true>)
      .def_static("norm_backward_scratch", &cuda::norm_backward_scratch);
}

}  // namespace pyllm

#include "bindings/bindings.h"

namespace pyllm {
namespace {

void rms_norm(Tensor x, Tensor weight, float eps, Tensor residual, Tensor y, Tensor residual_out,
              Tensor quantized, int group_size) {
  for (Tensor* t : {&x, &residual, &y, &residual_out}) *t = with_heads(*t);
  Check c("rms_norm");
  c(x, "x", "T H D", kFloats);
  c(weight, "weight", "D", kFloats);
  c.optional(residual, "residual", "T H D", {x.dtype});
  c.optional(residual_out, "residual_out", "T H D", {x.dtype});
  c.require(residual.defined() == residual_out.defined(),
            "residual and residual_out come together");
  if (quantized.defined()) {
    c.require(x.shape[1] == 1, "quantize: expected x [T, D], got " + describe(x));
    check_quantized(c, quantized, "quantized", c.dim("D"), group_size);
  } else {
    c(y, "out", "T H D", {x.dtype});
  }
  if (x.numel() == 0) return;
  merge_heads({&x, &residual, &y, &residual_out});
  RmsNormArgs args{x,          weight,       residual,
                   y,          residual_out, quantized,
                   group_size, eps,          rows_per_chunk(x.shape[0], x.shape[1] * x.shape[2])};
  run(make_launch("rms_norm", kernels().rms_norm, args, x.numel() / 4));
}

}  // namespace

void register_rms_norm(py::module_& m) { def_fast<&rms_norm>(m, "rms_norm"); }

}  // namespace pyllm

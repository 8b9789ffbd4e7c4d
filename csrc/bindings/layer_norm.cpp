#include "bindings/bindings.h"

namespace pyllm {
namespace {

void layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor residual, Tensor y,
                Tensor residual_out) {
  for (Tensor* t : {&x, &residual, &y, &residual_out}) *t = with_heads(*t);
  Check c("layer_norm");
  c(x, "x", "T H D", kFloats);
  c.optional(weight, "weight", "D", kFloats);
  c.optional(bias, "bias", "D", kFloats);
  if (weight.defined() && bias.defined()) c.same_dtype(weight, "weight", bias, "bias");
  c.optional(residual, "residual", "T H D", {x.dtype});
  c(y, "out", "T H D", {x.dtype});
  c.optional(residual_out, "residual_out", "T H D", {x.dtype});
  c.require(residual.defined() == residual_out.defined(),
            "residual and residual_out come together");
  if (x.numel() == 0) return;
  merge_heads({&x, &residual, &y, &residual_out});
  if (!weight.defined()) weight.dtype = bias.dtype;
  LayerNormArgs args{x, weight,       bias, residual,
                     y, residual_out, eps,  rows_per_chunk(x.shape[0], x.shape[1] * x.shape[2])};
  run(make_launch("layer_norm", kernels().layer_norm, args, x.numel() / 4));
}

}  // namespace

void register_layer_norm(py::module_& m) { def_fast<&layer_norm>(m, "layer_norm"); }

}  // namespace pyllm

#include "bindings/bindings.h"

namespace pyllm {
namespace {

template <bool Centered>
void norm_backward_cpu(Tensor dy, Tensor x, Tensor weight, float eps, Tensor residual_grad,
                       Tensor dx, Tensor dweight, Tensor dbias, Tensor partial) {
  for (Tensor* t : {&dy, &x, &residual_grad, &dx}) *t = with_heads(*t);
  Check c(Centered ? "layer_norm_backward" : "rms_norm_backward");
  c(x, "x", "T H D", kFloats);
  c(dy, "dy", "T H D", {x.dtype});
  c.optional(weight, "weight", "D", kFloats);
  c.optional(residual_grad, "residual_grad", "T H D", {x.dtype});
  c(dx, "out", "T H D", {x.dtype});
  c(dweight, "dweight", "D", kFloats);
  c.optional(dbias, "dbias", "D", kFloats);
  c(partial, "partial", dbias.defined() ? "2 B D" : "1 B D", {DType::F32});
  c.require(partial.shape[1] > 0, "partial: expected blocks, got " + describe(partial));
  if (x.numel() == 0) return;
  const NormBackwardArgs rows{dy, x, weight, residual_grad, dx, partial, eps, Centered};
  const NormBackwardSumArgs sum{partial, dweight, dbias};
  run(make_launch("norm_backward", kernels().norm_backward, rows, x.numel() / 2),
      make_launch("norm_backward_sum", kernels().norm_backward_sum, sum, partial.numel() / 8));
}

}  // namespace

void register_norm_backward(py::module_& m) {
  def_fast<&norm_backward_cpu<false>>(m, "rms_norm_backward");
  def_fast<&norm_backward_cpu<true>>(m, "layer_norm_backward");
}

}  // namespace pyllm

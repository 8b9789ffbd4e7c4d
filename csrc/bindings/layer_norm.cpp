#include "bindings/norm.h"

namespace pyllm {
namespace {

py::object layer_norm(py::handle x_object, Tensor weight, Tensor bias, float eps, Tensor residual,
                      py::handle out, py::handle residual_out) {
  const Tensor given = tensor_from_python(x_object);
  Tensor x = with_heads(given);
  residual = with_heads(residual);
  Check c("layer_norm");
  c(x, "x", "T H D", kFloats);
  c.optional(weight, "weight", "D", kFloats);
  c.optional(bias, "bias", "D", kFloats);
  if (weight.defined() && bias.defined()) c.same_dtype(weight, "weight", bias, "bias");
  NormOutputs results(c, x_object, given, residual, out, residual_out);
  if (x.numel() == 0) return results.result();
  merge_heads({&x, &residual, &results.rows, &results.sums});
  if (!weight.defined()) weight.dtype = bias.dtype;
  LayerNormArgs args{x,
                     weight,
                     bias,
                     residual,
                     results.rows,
                     results.sums,
                     eps,
                     rows_per_chunk(x.shape[0], x.shape[1] * x.shape[2])};
  run(make_launch("layer_norm", kernels().layer_norm, args, norm_work(x, residual)));
  return results.result();
}

}  // namespace

void register_layer_norm(py::module_& m) { def_fast<&layer_norm>(m, "layer_norm"); }

}  // namespace pyllm

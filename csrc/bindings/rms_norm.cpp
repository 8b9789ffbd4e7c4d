#include "bindings/norm.h"

namespace pyllm {
namespace {

// With `quantized`, y goes there in int8, and None is returned in its place.
py::object rms_norm(py::handle x_object, Tensor weight, float eps, Tensor residual, py::handle out,
                    py::handle residual_out, Tensor quantized, int group_size) {
  const Tensor given = tensor_from_python(x_object);
  Tensor x = with_heads(given);
  residual = with_heads(residual);
  Check c("rms_norm");
  c(x, "x", "T H D", kFloats);
  c(weight, "weight", "D", kFloats);
  if (quantized.defined()) {
    c.require(x.shape[1] == 1, "quantize: expected x [T, D], got ", x);
    check_quantized(c, quantized, "quantized", c.dim("D"), group_size);
  }
  NormOutputs results = quantized.defined()
                            ? NormOutputs(c, x_object, given, residual, residual_out)
                            : NormOutputs(c, x_object, given, residual, out, residual_out);
  if (x.numel() == 0) return results.result();
  merge_heads({&x, &residual, &results.rows, &results.sums});
  RmsNormArgs args{x,
                   weight,
                   residual,
                   results.rows,
                   results.sums,
                   quantized,
                   group_size,
                   eps,
                   rows_per_chunk(x.shape[0], x.shape[1] * x.shape[2])};
  run(make_launch("rms_norm", kernels().rms_norm, args, norm_work(x, residual)));
  return results.result();
}

}  // namespace

void register_rms_norm(py::module_& m) { def_fast<&rms_norm>(m, "rms_norm"); }

}  // namespace pyllm

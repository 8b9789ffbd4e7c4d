#include "bindings/bindings.h"

namespace pyllm {
namespace {

// With `quantized`, the result goes there in int8, and None is returned.
py::object activation(const std::string& kind, py::handle x_object, Tensor up, py::handle out,
                      Tensor quantized, int group_size) {
  const Tensor given = tensor_from_python(x_object);
  Tensor x = with_heads(given);
  up = with_heads(up);
  Check c("activation");
  const auto name = std::find(std::begin(kActivationNames), std::end(kActivationNames), kind);
  c.require(name != std::end(kActivationNames),
            "kind: expected relu, silu, gelu or gelu_tanh, got '", kind, "'");
  c(x, up.defined() ? "gate" : "x", "T H D", kFloats);
  c.optional(up, "up", "T H D", {x.dtype});
  Output output{py::none(), {}};
  Tensor y;
  if (quantized.defined()) {
    c.require(x.shape[1] == 1, "quantize: expected [T, D], got ", x);
    check_quantized(c, quantized, "quantized", c.dim("D"), group_size);
  } else {
    output = output_like(out, x_object, given);
    y = with_heads(output.tensor);
    c(y, "out", "T H D", {x.dtype});
  }
  if (x.numel() == 0) return output.object;
  merge_heads({&x, &up, &y});
  const auto index = name - std::begin(kActivationNames);
  constexpr int kWork[] = {1, 4, 5, 5};  // tenths of a nanosecond a value
  ActivationArgs args{x,
                      up,
                      y,
                      quantized,
                      group_size,
                      static_cast<Activation>(index),
                      rows_per_chunk(x.shape[0], x.shape[1] * x.shape[2])};
  run(make_launch(kActivationNames[index], kernels().activation, args,
                  x.numel() * kWork[index] / 10));
  return output.object;
}

}  // namespace

void register_activation(py::module_& m) { def_fast<&activation>(m, "activation"); }

}  // namespace pyllm

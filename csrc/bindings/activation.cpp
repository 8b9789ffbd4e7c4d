#include "bindings/bindings.h"

namespace pyllm {
namespace {

void activation(const std::string& kind, Tensor x, Tensor up, Tensor y, Tensor quantized,
                int group_size) {
  for (Tensor* t : {&x, &up, &y}) *t = with_heads(*t);
  Check c("activation");
  const auto name = std::find(std::begin(kActivationNames), std::end(kActivationNames), kind);
  c.require(name != std::end(kActivationNames),
            "kind: expected relu, silu, gelu or gelu_tanh, got '" + kind + "'");
  c(x, up.defined() ? "gate" : "x", "T H D", kFloats);
  c.optional(up, "up", "T H D", {x.dtype});
  if (quantized.defined()) {
    c.require(x.shape[1] == 1, "quantize: expected [T, D], got " + describe(x));
    check_quantized(c, quantized, "quantized", c.dim("D"), group_size);
  } else {
    c(y, "out", "T H D", {x.dtype});
  }
  if (x.numel() == 0) return;
  merge_heads({&x, &up, &y});
  const auto index = name - std::begin(kActivationNames);
  ActivationArgs args{x,
                      up,
                      y,
                      quantized,
                      group_size,
                      static_cast<Activation>(index),
                      rows_per_chunk(x.shape[0], x.shape[1] * x.shape[2])};
  run(make_launch(kActivationNames[index], kernels().activation, args, x.numel() / 2));
}

}  // namespace

void register_activation(py::module_& m) { def_fast<&activation>(m, "activation"); }

}  // namespace pyllm

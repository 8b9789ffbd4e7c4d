#include "bindings/bindings.h"
#include "bindings/quant_matrix.h"
#include "core/plan.h"

namespace pyllm {
namespace {

void look_up(Check& c, EmbeddingArgs args, int64_t vocabulary) {
  c(args.ids, "token_ids", "T", {DType::I32});
  c(args.y, "out", "T D", kFloats);
  if (args.y.numel() == 0) return;
  // What a plan will replay with is not known yet; the kernel guards against it.
  if (!capturing())
    for (int64_t t = 0; t < args.ids.shape[0]; ++t) {
      const int32_t id = args.ids.as<int32_t>()[t];
      c.require(id >= 0 && id < vocabulary, "token_ids: expected ids from 0 to ", vocabulary - 1,
                ", got ", id, " at position ", t);
    }
  args.tokens_per_chunk = rows_per_chunk(args.ids.shape[0], args.y.shape[1]);
  run(make_launch("embedding", kernels().embedding, args));
}

void embedding(Tensor ids, Tensor weight, Tensor y) {
  Check c("embedding");
  c(weight, "weight", "V D", kFloats);
  look_up(c, {ids, weight, y, {}, 1}, c.dim("V"));
}

void quant_embedding(Tensor ids, Tensor packed, int64_t n, int64_t k, int bits, int group_size,
                     bool has_minimum, Tensor y) {
  Check c("embedding");
  const QuantMatrix w = quant_matrix(c, packed, n, k, bits, group_size, has_minimum);
  c(y, "out", "_ " + std::to_string(k), kFloats);
  look_up(c, {ids, {}, y, w, 1}, n);
}

}  // namespace

void register_embedding(py::module_& m) {
  m.def("embedding", &embedding);
  m.def("quant_embedding", &quant_embedding);
}

}  // namespace pyllm

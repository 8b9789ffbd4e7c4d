#include "bindings/attention.h"
#include "bindings/batch_checks.h"

namespace pyllm {
namespace {

py::object flash_attention(py::handle q_object, Tensor k, Tensor v, Tensor cu_seqlens_q,
                           Tensor cu_seqlens_k, float scale, int64_t left, int64_t right,
                           float softcap, Tensor alibi_slopes, Tensor bias, Tensor sinks,
                           py::handle out_object, Tensor lse) {
  Tensor q = tensor_from_python(q_object);
  Check c("flash_attention");
  AttentionArgs a{};
  const bool ragged = cu_seqlens_q.defined();
  const auto sizes = [&](const char* dense, const char* packed) { return ragged ? packed : dense; };
  c(q, "q", sizes("B Sq H D", "Tq H D"), kFloats);
  c(k, "k", sizes("B Sk Hkv D", "Tk Hkv D"), kFloats);
  c(v, "v", sizes("B Sk Hkv D", "Tk Hkv D"), {k.dtype});
  const Output output = output_like(out_object, q_object, q);
  Tensor out = output.tensor;
  c(out, "out", sizes("B Sq H D", "Tq H D"), {q.dtype});
  c.optional(lse, "lse", sizes("B Sq H", "Tq H"), {DType::F32}, /*contiguous=*/true);
  c.require(ragged == cu_seqlens_k.defined(), "cu_seqlens_q and cu_seqlens_k come together");
  if (ragged) {
    c(cu_seqlens_q, "cu_seqlens_q", "B+1", {DType::I32});
    c(cu_seqlens_k, "cu_seqlens_k", "B+1", {DType::I32});
    c.require(c.dim("B+1") >= 1, "cu_seqlens_q: expected at least one entry, got none");
    c.require(!bias.defined(), "bias: expected none with cu_seqlens, only a dense batch takes one");
    if (!capturing()) {
      check_cu_seqlens(c, cu_seqlens_q, "cu_seqlens_q", c.dim("Tq"));
      check_cu_seqlens(c, cu_seqlens_k, "cu_seqlens_k", c.dim("Tk"));
    }
    a.batch = c.dim("B+1") - 1;
    q = as_batch(q), k = as_batch(k), v = as_batch(v), out = as_batch(out);
  } else {
    c.optional(bias, "bias", "B H Sq Sk", kFloats);
    a.batch = c.dim("B");
    a.max_splits = max_splits(c.dim("Sk"));
  }
  a.q = q, a.k = k, a.v = v, a.out = out, a.bias = bias;
  a.cu_seqlens_q = cu_seqlens_q.as<int32_t>();
  a.cu_seqlens_k = cu_seqlens_k.as<int32_t>();
  a.lse = lse.as<float>();
  a.left = left;
  a.right = right;
  run_attention(c, "flash_attention", a, k.shape[1], {scale, softcap, alibi_slopes, sinks});
  return output.object;
}

}  // namespace

void register_flash_attention(py::module_& m) { def_fast<&flash_attention>(m, "flash_attention"); }

}  // namespace pyllm

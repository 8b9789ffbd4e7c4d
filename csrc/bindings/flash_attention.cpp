#include "bindings/attention.h"
#include "bindings/batch_checks.h"

namespace pyllm {
namespace {

void flash_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                     float scale, int64_t left, int64_t right, float softcap, Tensor alibi_slopes,
                     Tensor bias, Tensor sinks, Tensor out, Tensor lse, Tensor partials) {
  Check c("flash_attention");
  AttentionArgs a{};
  const bool ragged = cu_seqlens_q.defined();
  const auto sizes = [&](const char* dense, const char* packed) { return ragged ? packed : dense; };
  c(q, "q", sizes("B Sq H D", "Tq H D"), kFloats);
  c(k, "k", sizes("B Sk Hkv D", "Tk Hkv D"), kFloats);
  c(v, "v", sizes("B Sk Hkv D", "Tk Hkv D"), {k.dtype});
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
  run_attention(c, "flash_attention", a, k.shape[1],
                {scale, softcap, alibi_slopes, sinks, partials});
}

int64_t flash_attention_partials(Tensor q, Tensor k) {
  if (q.ndim != 4 || k.ndim != 4) return 0;  // the call will say what is wrong
  return attention_partials(q.shape[0], q.shape[0] * q.shape[1], q.shape[2], k.shape[2], q.shape[3],
                            k.shape[1]);
}

}  // namespace

void register_flash_attention(py::module_& m) {
  def_fast<&flash_attention>(m, "flash_attention");
  m.def("flash_attention_partials", &flash_attention_partials);
}

}  // namespace pyllm

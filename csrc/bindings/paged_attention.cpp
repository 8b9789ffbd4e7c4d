#include "bindings/attention.h"
#include "bindings/batch_checks.h"

namespace pyllm {
namespace {

void check_contexts(const Check& c, const Tensor& cu_seqlens_q, const Tensor& page_table,
                    const Tensor& context_lens) {
  const int32_t *cu = cu_seqlens_q.as<int32_t>(), *lens = context_lens.as<int32_t>();
  for (int64_t b = 0; b < c.dim("B"); ++b) {
    c.require(lens[b] >= cu[b + 1] - cu[b], "context_lens[", b,
              "]: expected at least the sequence's ", cu[b + 1] - cu[b], " new tokens, got ",
              lens[b]);
    for (int64_t at = 0; at < lens[b]; at += c.dim("page_size"))
      check_page(c, page_table, b, at, c.dim("page_size"), c.dim("pages"));
  }
}

py::object paged_attention(py::handle q_object, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q,
                           Tensor page_table, Tensor context_lens, float scale, int64_t left,
                           float softcap, Tensor alibi_slopes, Tensor sinks, Tensor k_scale,
                           Tensor v_scale, py::handle out_object) {
  Check c("paged_attention");
  const Tensor q = tensor_from_python(q_object);
  c(q, "q", "T H D", kFloats);
  check_caches(c, k_cache, v_cache, {DType::F32, DType::BF16, DType::F16, DType::I8});
  const Output output = output_like(out_object, q_object, q);
  const Tensor& out = output.tensor;
  check_paged_batch(c, cu_seqlens_q, page_table, context_lens, k_scale, v_scale, out, q.dtype);
  const int64_t batch = c.dim("B"), page_size = c.dim("page_size");
  if (!capturing()) {
    check_cu_seqlens(c, cu_seqlens_q, "cu_seqlens_q", c.dim("T"));
    check_contexts(c, cu_seqlens_q, page_table, context_lens);
  }
  AttentionArgs a{};
  a.q = as_batch(q);
  a.k = k_cache;
  a.v = v_cache;
  a.out = as_batch(out);
  a.cu_seqlens_q = cu_seqlens_q.as<int32_t>();
  a.page_table = page_table.as<int32_t>();
  a.context_lens = context_lens.as<int32_t>();
  a.k_scale = k_scale.as<float>();
  a.v_scale = v_scale.as<float>();
  a.batch = batch;
  a.page_table_stride = page_table.stride[0];
  a.max_pages = page_table.shape[1];
  a.max_splits = max_splits(a.max_pages * page_size);
  a.left = left;
  a.right = 0;
  run_attention(c, "paged_attention", a, a.max_pages * page_size,
                {scale, softcap, alibi_slopes, sinks});
  return output.object;
}

}  // namespace

void register_paged_attention(py::module_& m) { def_fast<&paged_attention>(m, "paged_attention"); }

}  // namespace pyllm

#include "bindings/batch_checks.h"

namespace pyllm {
namespace {

void rope_cache(Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor k_cache,
                Tensor v_cache, Tensor cu_seqlens_q, Tensor page_table, bool interleaved,
                Tensor out) {
  Check c("rope_cache");
  c(q, "q", "T H D", kFloats);
  c(k, "k", "T Hkv D", {q.dtype});
  c(v, "v", "T Hkv D", {q.dtype});
  c(cos_sin, "cos_sin", "P R", {DType::F32});
  c(positions, "positions", "T", {DType::I32});
  check_caches(c, k_cache, v_cache, kFloats);
  check_batch(c, cu_seqlens_q, page_table);
  c(out, "out", "T H D", {q.dtype});
  const int64_t batch = c.dim("B"), pages = c.dim("pages"), page_size = c.dim("page_size");
  c.require(c.dim("R") % 2 == 0 && c.dim("R") <= c.dim("D"),
            "cos_sin: expected an even width of at most D = ", c.dim("D"), ", got ", c.dim("R"));
  if (!capturing()) check_cu_seqlens(c, cu_seqlens_q, "cu_seqlens_q", c.dim("T"));
  if (c.dim("T") == 0) return;
  c.require(c.dim("P") >= 1, "cos_sin: expected at least one position, got none");
  if (!capturing()) {
    const int32_t *cu = cu_seqlens_q.as<int32_t>(), *at = positions.as<int32_t>();
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = cu[b]; t < cu[b + 1]; ++t) {
        c.require(at[t] >= 0 && at[t] < c.dim("P"), "positions[", t, "]: expected 0 to ",
                  c.dim("P") - 1, ", got ", at[t]);
        check_page(c, page_table, b, at[t], page_size, pages);
      }
  }
  int64_t tokens_per_chunk =
      rows_per_chunk(c.dim("T"), (c.dim("H") + 2 * c.dim("Hkv")) * c.dim("D"));
  // Threads that write keys side by side into one page would take its memory from each other.
  if (k_cache.stride[3] != 1) tokens_per_chunk = std::max(tokens_per_chunk, page_size);
  RopeCacheArgs args{q,
                     k,
                     v,
                     cos_sin,
                     k_cache,
                     v_cache,
                     out,
                     positions.as<int32_t>(),
                     cu_seqlens_q.as<int32_t>(),
                     page_table.as<int32_t>(),
                     page_table.stride[0],
                     page_table.shape[1],
                     batch,
                     tokens_per_chunk,
                     interleaved};
  run(make_launch("rope_cache", kernels().rope_cache, args));
}

}  // namespace

void register_rope_cache(py::module_& m) { def_fast<&rope_cache>(m, "rope_cache"); }

}  // namespace pyllm

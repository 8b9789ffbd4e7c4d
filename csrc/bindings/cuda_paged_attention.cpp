#include "bindings/batch_checks.h"
#include "bindings/cuda_attention.h"

namespace pyllm {
namespace {

void cuda_paged_attention(DeviceLibrary& library, DeviceTensor q, DeviceTensor k_cache,
                          DeviceTensor v_cache, DeviceTensor cu_seqlens_q, DeviceTensor page_table,
                          DeviceTensor context_lens, float scale, int left, float softcap,
                          DeviceTensor alibi_slopes, DeviceTensor sinks, DeviceTensor k_scale,
                          DeviceTensor v_scale, DeviceTensor out, DeviceTensor partials,
                          uintptr_t stream) {
  Check c("paged_attention");
  c(q, "q", "T H D", {DType::F16, DType::BF16});
  c(k_cache, "k_cache", "pages page_size Hkv D", {q.dtype, DType::I8, DType::E4M3});
  c(v_cache, "v_cache", "pages page_size Hkv D", {k_cache.dtype});
  check_paged_batch(c, cu_seqlens_q, page_table, context_lens, k_scale, v_scale, out, q.dtype);
  const int64_t batch = c.dim("B"), page_size = c.dim("page_size");
  c.require(page_size >= 1, "k_cache: expected a page size of at least 1, got 0");
  const AttentionOptions options{scale, softcap, alibi_slopes, sinks};
  check_cuda_attention(c, options,
                       {{"q", q}, {"k_cache", k_cache}, {"v_cache", v_cache}, {"out", out}});
  for (const Tensor* t : {&k_cache, &v_cache})
    c.require(t->shape[0] * t->stride[0] / (16 / item_size(t->dtype)) < int64_t{1} << 32,
              "k_cache and v_cache: expected fewer than 2^36 bytes, got ", *t);
  if (batch == 0 || q.numel() == 0) return;
  cuda::PagedAttentionArgs a{};
  a.q = q, a.k = k_cache, a.v = v_cache, a.out = out, a.page_table = page_table;
  a.cu_seqlens_q = cu_seqlens_q.as<int32_t>();
  a.context_lens = context_lens.as<int32_t>();
  a.k_scale = k_scale.as<float>();
  a.v_scale = v_scale.as<float>();
  if (partials.defined()) {
    const int64_t needed = cuda::PagedAttentionPlan(c.dim("T"), batch, c.dim("H"), c.dim("Hkv"),
                                                    c.dim("D"), c.dim("max_pages") * page_size)
                               .partial_floats();
    c(partials, "partials", "_", {DType::F32});
    c.require(needed > 0 && partials.numel() >= needed, "partials: expected ", needed,
              " floats, got ", partials);
    a.partials = partials.as<float>();
  }
  a.left = left;
  fill_options(a, options);
  library.run(&cuda::Kernels::paged_attention, a, stream,
              {{"q", q},
               {"k_cache", k_cache},
               {"v_cache", v_cache},
               {"cu_seqlens_q", cu_seqlens_q},
               {"page_table", page_table},
               {"context_lens", context_lens},
               {"alibi_slopes", alibi_slopes},
               {"sinks", sinks},
               {"k_scale", k_scale},
               {"v_scale", v_scale},
               {"out", out},
               {"partials", partials}});
}

// How many floats the partial sums of a call need, 0 if it needs none.
int64_t cuda_paged_attention_partials(int64_t tokens, int64_t batch, int64_t heads,
                                      int64_t kv_heads, int64_t head_dim, int64_t max_keys) {
  if (tokens == 0 || kv_heads == 0) return 0;
  return cuda::PagedAttentionPlan(tokens, batch, heads, kv_heads, head_dim, max_keys)
      .partial_floats();
}

}  // namespace

void register_cuda_paged_attention(DeviceLibraryClass& c) {
  c.def("paged_attention", &cuda_paged_attention)
      .def_static("paged_attention_partials", &cuda_paged_attention_partials);
}

}  // namespace pyllm

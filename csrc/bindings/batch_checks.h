// Checks of the integers that describe a ragged batch over a paged cache. They read memory that
// later replays of a plan will have changed, so they run when an op runs at once and not when it is
// recorded; the kernels themselves never follow such an integer out of a tensor.
#pragma once
#include "bindings/bindings.h"

namespace pyllm {

// `cu` runs from 0 to `total` and never falls.
inline void check_cu_seqlens(const Check& c, const Tensor& cu, const char* name, int64_t total) {
  const int32_t* at = cu.as<int32_t>();
  const int64_t n = cu.shape[0];
  bool ok = at[0] == 0 && at[n - 1] == total;
  for (int64_t i = 1; i < n; ++i) ok &= at[i - 1] <= at[i];
  c.require(ok, name, ": expected to run from 0 to ", total, " without falling, got ", at[0],
            " to ", at[n - 1]);
}

// The number of sequences, B of page_table [B, max_pages], has its B + 1 offsets.
inline void check_batch(Check& c, const Tensor& cu_seqlens_q, const Tensor& page_table) {
  c(page_table, "page_table", "B max_pages", {DType::I32});
  c(cu_seqlens_q, "cu_seqlens_q", "_", {DType::I32});
  c.require(cu_seqlens_q.shape[0] == c.dim("B") + 1,
            "cu_seqlens_q: expected B + 1 = ", c.dim("B") + 1, " entries, got ",
            cu_seqlens_q.shape[0]);
}

// The tensors of paged_attention beside q and the caches, which are checked before.
inline void check_paged_batch(Check& c, const Tensor& cu_seqlens_q, const Tensor& page_table,
                              const Tensor& context_lens, const Tensor& k_scale,
                              const Tensor& v_scale, const Tensor& out, DType dtype) {
  check_batch(c, cu_seqlens_q, page_table);
  c(context_lens, "context_lens", "B", {DType::I32});
  c.optional(k_scale, "k_scale", "Hkv", {DType::F32});
  c.optional(v_scale, "v_scale", "Hkv", {DType::F32});
  c(out, "out", "T H D", {dtype});
}

// The page that holds position `position` of sequence b exists.
inline void check_page(const Check& c, const Tensor& page_table, int64_t b, int64_t position,
                       int64_t page_size, int64_t pages) {
  const int64_t index = position / page_size;
  c.require(index < page_table.shape[1], "page_table: expected a page for position ", position,
            " of sequence ", b, ", got room for ", page_table.shape[1] * page_size, " positions");
  const int64_t page = page_table.row<int32_t>(b)[index];
  c.require(page >= 0 && page < pages, "page_table[", b, ", ", index,
            "]: expected a page from 0 to ", pages - 1, ", got ", page);
}

// The cache of keys and that of values. The keys of a page may also lie side by side: then the
// stride between them is 1, and groups of 16 must not straddle pages.
inline void check_caches(Check& c, Tensor& k_cache, const Tensor& v_cache, DTypes dtypes) {
  if (k_cache.ndim == 4 && k_cache.shape[3] == 1) k_cache.stride[3] = 1;
  if (k_cache.ndim == 4 && k_cache.stride[3] != 1 && k_cache.stride[1] == 1) {
    Tensor by_element = k_cache;
    std::swap(by_element.shape[1], by_element.shape[3]);
    std::swap(by_element.stride[1], by_element.stride[3]);
    c(by_element, "k_cache (keys side by side)", "pages D Hkv page_size", dtypes);
    c.require(c.dim("page_size") % 16 == 0 && c.dim("D") <= kMaxHeadDim,
              "k_cache: expected a page size that is a multiple of 16 and a head dim of at most ",
              kMaxHeadDim, " where keys lie side by side, got ", c.dim("page_size"), " and ",
              c.dim("D"));
  } else {
    c(k_cache, "k_cache", "pages page_size Hkv D", dtypes);
  }
  c(v_cache, "v_cache", "pages page_size Hkv D", {k_cache.dtype});
  c.require(c.dim("page_size") >= 1, "k_cache: expected a page size of at least 1, got 0");
}

}  // namespace pyllm

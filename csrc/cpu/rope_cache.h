#pragma once
#include "core/tensor.h"

namespace pyllm {

// Rotates q into q_out and k into the paged cache, and copies v there. q and q_out are [T, H, D], k
// and v [T, Hkv, D], the caches [pages, page_size, Hkv, D], all with any strides but the last,
// or the keys of a page side by side (see attention.h); cos_sin is float32 [P, R] with the cosines
// in the first half. A chunk is a block of T.
//
// Whatever the integers say when a plan is replayed, nothing outside the tensors is touched: a
// position outside the tables rotates by the nearest angle and is not cached.
struct RopeCacheArgs {
  Tensor q, k, v, cos_sin, k_cache, v_cache, q_out;
  const int32_t *positions, *cu_seqlens_q, *page_table;
  int64_t page_table_stride, max_pages, batch;
  int64_t tokens_per_chunk;
  bool interleaved;
  int64_t chunks() const { return (q.shape[0] + tokens_per_chunk - 1) / tokens_per_chunk; }
};

}  // namespace pyllm

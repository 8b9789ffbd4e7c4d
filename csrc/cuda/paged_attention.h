#pragma once
#include <algorithm>

#include "core/tensor.h"

namespace pyllm::cuda {

// Softmax attention of new tokens, float16 or bfloat16 [T, H, D], over their sequences' keys and
// values in caches [pages, page_size, Hkv, D] of q's dtype, int8 or float8; rows on 16 bytes, D up
// to 256. Whatever the integers say, nothing outside of the tensors is touched.
struct PagedAttentionArgs {
  Tensor q, k, v, out, page_table;             // page_table [B, max_pages]
  const int32_t *cu_seqlens_q, *context_lens;  // [B + 1], [B]
  const float *alibi_slopes, *sinks;           // [H] or null
  const float *k_scale, *v_scale;              // [Hkv] or null
  float* partials;                             // as PagedAttentionPlan says, or null
  int left;                                    // keys seen before one's own, -1: all
  float scale, softcap;                        // softcap 0: none
};

// How a call is cut. Results do not depend on it: a row sums up each kSplitKeys keys by themselves,
// counted from key 0, and puts these sums together in order, in one block or in several.
struct PagedAttentionPlan {
  static constexpr int kSplitKeys = 512;
  static constexpr int64_t kEnoughBlocks = 1024;  // that keep any device busy

  bool decode;     // tiles of 16 rows
  int64_t dim;     // the head dim of tiles and partial sums
  int64_t tiles;   // at most so many, of the rows that share a KV head
  int64_t splits;  // of the longest sequence that the page table has room for
  int64_t blocks;  // that share the splits of a tile
  int64_t n_sums;  // partial sums: a token's, for each head and split; 0: blocks == 1

  // Rows of a tile that is not for decoding; of more than 32 rows of 256 elements, some devices'
  // shared memory would not hold the sums.
  static constexpr int prefill_rows(int64_t dim) { return dim == 256 ? 32 : 64; }

  PagedAttentionPlan(int64_t tokens, int64_t batch, int64_t heads, int64_t kv_heads,
                     int64_t head_dim, int64_t max_keys) {
    const int64_t rows = tokens * (heads / kv_heads);
    decode = rows <= 32 * batch;
    dim = head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
    tiles = rows / (decode ? 16 : prefill_rows(dim)) + batch;
    splits = (max_keys + kSplitKeys - 1) / kSplitKeys;
    const int64_t wanted = kEnoughBlocks / std::max<int64_t>(tiles * kv_heads, 1);
    blocks = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(std::min<int64_t>(splits, 65535), 1));
    n_sums = tokens * heads * splits;
    if (n_sums * dim > 1 << 27) blocks = 1;  // half a gigabyte of them
    if (blocks == 1) n_sums = 0;
  }
  // Floats: the sums, then of each the largest logit, the sum of weights, whether values that are
  // not finite were left out, and one to spare.
  int64_t partial_floats() const { return n_sums * (dim + 4); }
};

}  // namespace pyllm::cuda

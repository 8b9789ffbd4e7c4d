#pragma once
#include "core/tensor.h"

namespace pyllm {

// The keys that one partial softmax runs over, counted from key 0 of the sequence: the unit that
// threads share when there are few queries. A result depends on it, so it depends on nothing.
constexpr int64_t kSplitKeys = 256;
constexpr int64_t kMaxHeadDim = 256;
// The rows of a tile times the padded head dim: what fits the L1 cache beside a block of keys.
constexpr int64_t kTileFloats = 6144, kMaxTileRows = 96;

// Softmax attention of q over k and v, for flash_attention and paged_attention alike.
//
// q and out are [B, S, H, D] with any strides but the last; a ragged batch has cu_seqlens_q and
// stride[0] == 0. k and v are the same with Hkv heads, or, with a page table, caches of
// [pages, page_size, Hkv, D], where the keys of a page may also lie side by side (stride 1 between
// keys, page_size a multiple of 16): element by element, as their sums want them. Query i of a
// sequence stands at position p = i + k_len - q_len and sees the keys from p - left to p + right, a
// side below 0 meaning no limit.
//
// Whatever the integers say when a plan is replayed, nothing outside the tensors is touched.
struct AttentionArgs {
  Tensor q, k, v, out;
  Tensor bias;  // [B, H, Sq, Sk], stride 0 where broadcast, or undefined; bool: which keys are seen
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // null: dense
  const int32_t *page_table, *context_lens;    // null: not paged
  const float *alibi_slopes, *sinks;           // [H] or null
  const float *k_scale, *v_scale;              // [Hkv] or null
  float* lse;                                  // [tokens, H] or null
  float* partials;  // [slots(), H, max_splits, partial_size()], or null: splits are never shared
  int64_t batch, page_table_stride, max_pages, max_splits;
  int64_t left, right;
  float scale, softcap;  // softcap 0: none
  // By set_shapes(), so that nothing is divided by them more often than it must be: how many query
  // heads share a KV head, the rows of a tile, and of how many queries a sequence may be that
  // shares out its splits.
  int64_t group, tile_rows, split_queries;

  struct Sequence {
    int64_t b, q_start, q_len, k_start, k_len;
  };
  struct Range {
    int64_t begin, end;
  };

#define PYLLM_MEMBER __attribute__((always_inline)) inline

  static PYLLM_MEMBER int64_t clamp(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
  }
  PYLLM_MEMBER void set_shapes() {
    group = q.shape[2] / k.shape[2];
    tile_rows = clamp(kTileFloats / padded_dim() / 12 * 12, 24, kMaxTileRows);
    split_queries = clamp(tile_rows / (group > 0 ? group : 1), 1, 96);
  }
  PYLLM_MEMBER bool keys_side_by_side() const { return page_table && k.stride[3] != 1; }
  PYLLM_MEMBER int64_t tokens() const { return cu_seqlens_q ? q.shape[1] : batch * q.shape[1]; }

  PYLLM_MEMBER Sequence sequence(int64_t b) const {
    Sequence s{b, 0, q.shape[1], 0, k.shape[1]};
    if (cu_seqlens_q) {
      s.q_start = clamp(cu_seqlens_q[b], 0, q.shape[1]);
      s.q_len = clamp(cu_seqlens_q[b + 1], s.q_start, q.shape[1]) - s.q_start;
    }
    if (cu_seqlens_k) {
      s.k_start = clamp(cu_seqlens_k[b], 0, k.shape[1]);
      s.k_len = clamp(cu_seqlens_k[b + 1], s.k_start, k.shape[1]) - s.k_start;
    }
    if (context_lens)
      s.k_len = clamp(context_lens[b], 0, k.shape[0] == 0 ? 0 : max_pages * k.shape[1]);
    return s;
  }
  // The keys that query i sees; {0, 0} if it sees none.
  PYLLM_MEMBER Range visible(const Sequence& s, int64_t i) const {
    const int64_t p = i + s.k_len - s.q_len;
    const int64_t begin = left < 0 ? 0 : clamp(p - left, 0, s.k_len);
    const int64_t end = right < 0 ? s.k_len : clamp(p + right + 1, 0, s.k_len);
    return begin < end ? Range{begin, end} : Range{0, 0};
  }

  PYLLM_MEMBER Range splits(const Sequence& s) const {
    const int64_t begin = visible(s, 0).begin / kSplitKeys;
    const int64_t end = (s.k_len + kSplitKeys - 1) / kSplitKeys;
    return {begin < end ? begin : 0, end};
  }
  PYLLM_MEMBER bool shares_splits(const Sequence& s) const {
    if (!partials || s.q_len > split_queries) return false;
    const Range r = splits(s);
    return r.end - r.begin > 1;
  }
  PYLLM_MEMBER int64_t slots() const {
    const int64_t most = batch * split_queries;
    return tokens() < most ? tokens() : most;
  }
  // A partial result: D accumulators (padded to whole vectors), the maximum and the sum.
  PYLLM_MEMBER int64_t padded_dim() const { return (q.shape[3] + 15) / 16 * 16; }
  PYLLM_MEMBER int64_t partial_size() const { return padded_dim() + 16; }
  PYLLM_MEMBER int64_t token(const Sequence& s, int64_t i) const {
    return cu_seqlens_q ? s.q_start + i : s.b * q.shape[1] + i;
  }
  PYLLM_MEMBER float* partial(const Sequence& s, int64_t i, int64_t head, int64_t split) const {
    const int64_t slot = tokens() <= slots() ? token(s, i) : s.b * split_queries + i;
    return partials + ((slot * q.shape[2] + head) * max_splits + split) * partial_size();
  }

  // A row is one query of one head of a group, numbered query by query; a tile is so many rows. A
  // chunk is one tile of one KV head of one sequence, over all its keys or one split.
  PYLLM_MEMBER int64_t tiles(const Sequence& s) const {
    return (s.q_len * group + tile_rows - 1) / tile_rows;
  }
  PYLLM_MEMBER int64_t chunks_of(const Sequence& s) const {
    const int64_t n = tiles(s) * k.shape[2];
    if (!shares_splits(s)) return n;
    const Range r = splits(s);
    return n * (r.end - r.begin);
  }
  PYLLM_MEMBER int64_t chunks() const {
    int64_t n = 0;
    for (int64_t b = 0; b < batch; ++b) n += chunks_of(sequence(b));
    return n;
  }
};

// Puts the partial results together, in the order of the keys. A chunk is a KV head of a sequence.
struct AttentionCombineArgs {
  AttentionArgs attention;
  PYLLM_MEMBER int64_t chunks() const { return attention.batch * attention.k.shape[2]; }
};

#undef PYLLM_MEMBER

}  // namespace pyllm

// What the bindings of flash_attention and paged_attention share.
#pragma once
#include "bindings/bindings.h"

namespace pyllm {

// [T, H, D] as [1, T, H, D], whatever the sequences in it.
inline Tensor as_batch(Tensor t) {
  Tensor r = t;
  r.ndim = 4;
  r.shape[0] = 1;
  r.stride[0] = 0;
  for (int i = 0; i < 3; ++i) r.shape[i + 1] = t.shape[i], r.stride[i + 1] = t.stride[i];
  return r;
}

inline int64_t max_splits(int64_t keys) { return (keys + kSplitKeys - 1) / kSplitKeys; }

// How many floats the partial results of a call need: 0 if threads do not share the splits of a
// sequence, because there is one split only or too many queries.
inline int64_t partial_floats(const AttentionArgs& a) {
  const bool dense = !a.cu_seqlens_q;
  if (a.max_splits < 2 || (dense && a.q.shape[1] > a.split_queries)) return 0;
  return a.slots() * a.q.shape[2] * a.max_splits * a.partial_size();
}

struct AttentionOptions {
  float scale, softcap;
  Tensor alibi_slopes, sinks;
};

// The checks that the two ops have in common, once H, Hkv and D are known.
inline void check_attention_options(Check& c, const AttentionOptions& options) {
  const int64_t heads = c.dim("H"), kv_heads = c.dim("Hkv"), d = c.dim("D");
  c.optional(options.alibi_slopes, "alibi_slopes", "H", {DType::F32});
  c.optional(options.sinks, "sinks", "H", {DType::F32});
  c.require(kv_heads >= 1 && heads % kv_heads == 0, "q: expected a multiple of the ", kv_heads,
            " KV heads, got ", heads, " heads");
  c.require(d >= 1 && d <= kMaxHeadDim, "q: expected a head dim from 1 to ", kMaxHeadDim, ", got ",
            d);
  c.require(options.scale == options.scale && options.softcap >= 0,
            "scale and softcap: expected numbers, softcap at least 0, got ", options.scale, " and ",
            options.softcap);
}

template <class Args>
void fill_options(Args& a, const AttentionOptions& options) {
  a.scale = options.scale;
  a.softcap = options.softcap;
  a.alibi_slopes = options.alibi_slopes.as<float>();
  a.sinks = options.sinks.as<float>();
}

// Checks the options, fills in the arguments and launches.
inline void run_attention(Check& c, const char* name, AttentionArgs& a, int64_t max_keys,
                          const AttentionOptions& options) {
  check_attention_options(c, options);
  if (a.batch == 0 || a.q.numel() == 0) return;
  fill_options(a, options);
  a.set_shapes();
  // Some thirty multiplications a nanosecond, were every query to see as many keys as may be, or of
  // few queries a dozen numbers of keys and values; and what a row and a chunk take at least.
  const int64_t kv_heads = a.batch * a.k.shape[2], d = a.q.shape[3];
  const int64_t work = std::max(a.q.numel() * max_keys * 2 / 30, kv_heads * max_keys * d * 2 / 12) +
                       a.q.numel() / d * 30 + kv_heads * 300;
  if (const int64_t floats = partial_floats(a)) {
    const Scratch partials = scratch(1, floats * static_cast<int64_t>(sizeof(float)));
    a.partials = partials.tensor.as<float>();
    run(make_launch(name, kernels().attention, a, work),
        make_launch("attention_combine", kernels().attention_combine, AttentionCombineArgs{a}, 0));
  } else {
    run(make_launch(name, kernels().attention, a, work));
  }
}

}  // namespace pyllm

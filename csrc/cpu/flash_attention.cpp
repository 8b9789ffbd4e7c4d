// Attention in blocks of 128 keys with a running softmax (Milakov and Gimelshein, 2018; Dao et al.,
// 2022), in float32 and to base 2.
//
// A chunk is a tile of rows (queries times the heads that share a KV head), so that a block of keys
// and values is read once for all of them. Keys are summed sixteen to a vector, so that no sum runs
// across a register: the runtime's cache has them side by side already, others are transposed on
// the way in. Keys go by in splits of 256, each with a softmax of its own; the splits are put
// together in order, here or, where threads share them, in paged_attention.cpp. Blocks and splits
// are counted from key 0 and rows never meet, so one query gives the same bits alone or among
// others, decoded or prefilled, on any number of threads. Keys that a row does not see take no part
// in its sums, not even times zero.
//
// The floor of decoding is the bytes of the keys and values that are seen, over bandwidth; of
// prefill 4 * D * (visible pairs) operations over the peak of float32. On two Zen 4 cores, 9 heads
// over 3 of 64, float16 cache, decoding at depth 512 takes 11 us from L2, which is the speed of
// memory, and 18 inside a model, whose weights push the cache out to memory; eight sequences take
// 120 (27 GB/s). What that took: keys side by side (36 us before, 300 for eight), and asking for a
// block's values while its scores are summed and for the next keys while its values are, a line or
// two a step. All lines at once, or into L1, is worse than not to ask: a core can wait for some 24
// lines there. Pages of 64 keys gain 2 us. Prefill of 512 takes 1.95 ms, 70 % of the peak, a
// quarter of it weighing scores: what is done once a row and block (largest score, sum) waits for
// itself, so blocks of 128 gain 7 % over 64, and 256 lose in decoding what they gain. 2^n by
// vscalefps gains nothing.
//
// What one query over keys that lie apart, in float32, took: transposing them in registers for its
// scores, without a copy (20 to 40 % less time), and as many sums of values at once as there are
// vectors in a head. In ragged batches of sentences half of the time went into waiting for rows of
// queries, keys and values, which are now asked for ahead, and into divisions a row.
#include "cpu/attention_row.h"
#include "cpu/attention_tile.h"

namespace pyllm::PYLLM_ISA {
namespace {

static_assert(kSplitKeys % kBlockKeys == 0);
alignas(64) constexpr float kIota[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The running softmax of a tile's rows: maximum, sum of 2^(score - maximum), weighted values.
struct Softmax {
  float maximum[kMaxTileRows], sum[kMaxTileRows];
  alignas(64) float values[kTileFloats];

  void reset(int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) maximum[r] = -kInf, sum[r] = 0;
    for (int64_t i = 0; i < rows * width; i += kLanes) store(values + i, zero());
  }
};

struct Row {
  int64_t query, head;
  Range visible;
};

// What a chunk works in: one a thread, so that nothing is allocated while a plan runs.
struct Workspace {
  alignas(64) float keys[kMaxHeadDim * kBlockKeys];
  alignas(64) float values[kBlockKeys * kMaxHeadDim];
  alignas(64) float q[kTileFloats];
  alignas(64) float weights[kTileRows * kBlockKeys];
  Row rows[kMaxTileRows];
  Softmax split, total;
};

// One chunk, for keys and values of type T.
template <class T>
struct Tile {
  const AttentionArgs& a;
  const Sequence s;
  const int64_t kv_head, first_row, rows, d, width;
  Workspace& w;
  // One tile of registers: keys that lie apart are then transposed in registers, for once.
  const bool few;
  // Keys that lie side by side, and values in whole vectors, may be read where they are: the others
  // are copied to w.keys and w.values. Half precision leaves a block in L1 for all rows; but where
  // converting is slow, it is worth a copy once several tiles of rows read the block.
  const bool keys_in_place, values_in_place;
  bool has_queries = false;  // whether they were loaded: they come after the first keys
  // Where the keys of two blocks lie, key j at j % kFound: a block is looked up before the one
  // before it is worked on, so that its memory can be asked for meanwhile.
  static constexpr int64_t kFound = 2 * kBlockKeys;
  bool more;                           // whether a block follows in this split
  int64_t found_end;                   // up to which key they were looked up
  const T* k_rows[kFound];             // where keys lie side by side, its share of their memory
  const T* k_groups[kFound / kLanes];  // and their groups of sixteen
  const T* v_rows[kFound];
  const float* k_copies[kBlockKeys / kLanes];
  const float* v_copies[kBlockKeys];

  Tile(const AttentionArgs& args, const Sequence& sequence, int64_t head, int64_t row,
       Workspace& workspace)
      : a(args),
        s(sequence),
        kv_head(head),
        first_row(row),
        rows(smaller(a.tile_rows, s.q_len * a.group - row)),
        d(a.q.shape[3]),
        width(a.padded_dim()),
        w(workspace),
        few(rows <= kTileRows),
        keys_in_place(a.keys_side_by_side() && (kTileRows >= 6 || rows <= 2 * kTileRows)),
        values_in_place(d % kLanes == 0 &&
                        (sizeof(T) == 4 || kTileRows >= 6 || rows <= 2 * kTileRows)) {}

  template <class F>
  void each_query(F f) {
    dispatch_float(a.q.dtype, [&](auto* type) {
      using Q = std::remove_pointer_t<decltype(type)>;
      for (int64_t r = 0; r < rows; ++r)
        f(r, a.q.row<Q>(s.b, s.q_start + w.rows[r].query) + w.rows[r].head * a.q.stride[2]);
    });
  }
  // Queries in float32, times the factors that every score has.
  void load_queries() {
    has_queries = true;
    float scale = a.softcap > 0 ? a.scale / a.softcap : a.scale * kLog2e;
    if (a.k_scale) scale *= a.k_scale[kv_head];
    each_query([&](int64_t r, auto* q) {
      for (int64_t i = 0; i < d; i += kLanes)
        store(w.q + r * width + i, load_n(q + i, d - i) * splat(scale));
    });
  }

  void find_rows(Range keys) {
    found_end = keys.end;
    const T* k = static_cast<const T*>(a.k.data) + kv_head * a.k.stride[2];
    const T* v = static_cast<const T*>(a.v.data) + kv_head * a.v.stride[2];
    const bool side_by_side = a.keys_side_by_side();
    const auto found = [&](int64_t j, int64_t outer, int64_t inner) {
      k_rows[j % kFound] = k + outer * a.k.stride[0] + inner * a.k.stride[1];
      if (side_by_side) {
        k_groups[j % kFound / kLanes] = k_rows[j % kFound] - inner % kLanes;
        k_rows[j % kFound] += inner * (d - 1);
      }
      v_rows[j % kFound] = v + outer * a.v.stride[0] + inner * a.v.stride[1];
    };
    if (!a.page_table) {
      for (int64_t j = keys.begin; j < keys.end; ++j) found(j, s.b, s.k_start + j);
      return;
    }
    const int32_t* table = a.page_table + s.b * a.page_table_stride;
    const int64_t page_size = a.k.shape[1];
    int64_t at = keys.begin / page_size, slot = keys.begin % page_size;
    for (int64_t j = keys.begin; j < keys.end; ++at, slot = 0) {
      const int64_t page = AttentionArgs::clamp(table[at], 0, a.k.shape[0] - 1);
      for (; slot < page_size && j < keys.end; ++slot, ++j) found(j, page, slot);
    }
  }

  // Asks for the values of the keys from g on, and for keys that come soon.
  void ask_ahead(int64_t g, Range keys) const {
    constexpr int64_t kAhead = 2 * kLanes;
    for (int64_t j = larger(g, keys.begin); j < smaller(g + kLanes, keys.end); ++j) {
      ask_for(v_rows[j % kFound], d);
      if (j + kAhead < found_end) ask_for(k_rows[(j + kAhead) % kFound], d);
    }
  }

  // The sixteen keys from g on; where nobody sees one, one that somebody does stands in for it.
  const T* const* group_rows(int64_t g, Range keys, const T* (&from)[kLanes]) const {
    if (g >= keys.begin && g + kLanes <= keys.end) return k_rows + g % kFound;
    for (int64_t j = 0; j < kLanes; ++j)
      from[j] = k_rows[AttentionArgs::clamp(g + j, keys.begin, keys.end - 1) % kFound];
    return from;
  }

  void load_block(int64_t block, Range keys) {
    const int64_t seen = keys.begin / kLanes * kLanes;
    if (a.keys_side_by_side()) {
      const T** groups = k_groups + block % kFound / kLanes;
      // Likewise of whole groups.
      for (int64_t g = 0; g < (seen - block) / kLanes; ++g)
        groups[g] = groups[(seen - block) / kLanes];
      if (!keys_in_place)
        for (int64_t g = seen; g < keys.end; g += kLanes) {
          const T* from = groups[(g - block) / kLanes];
          for (int64_t i = 0; i < d; ++i)
            store(w.keys + i * kBlockKeys + g - block, load(from + i * a.k.stride[3]));
        }
    } else if (!few) {
      for (int64_t g = seen; g < keys.end; g += kLanes) {
        const T* from[kLanes];
        ask_ahead(g, keys);
        transpose_keys(group_rows(g, keys, from), d, w.keys + g - block);
      }
    }
    if (values_in_place) return;
    for (int64_t j = keys.begin; j < keys.end; ++j)
      for (int64_t i = 0; i < d; i += kLanes)
        store(w.values + (j - block) * width + i, load_n(v_rows[j % kFound] + i, d - i));
  }

  f32x16 load_bias(int64_t r, int64_t j, int64_t n) const {
    const int64_t* stride = a.bias.stride;
    const auto [query, head, _] = w.rows[r];
    const int64_t at = s.b * stride[0] + head * stride[1] + query * stride[2] + j;
    if (a.bias.dtype == DType::Bool) {
      const f32x16 seen = load_n(static_cast<const int8_t*>(a.bias.data) + at, n);
      return select_less(zero(), abs(seen), zero(), splat(-kInf));
    }
    f32x16 x;
    dispatch_float(a.bias.dtype, [&](auto* type) {
      x = load_n(static_cast<decltype(type)>(a.bias.data) + at, n);
    });
    return x;
  }

  // Finishes the scores of row r in a block, and returns the largest.
  float finish_scores(int64_t r, int64_t block, int64_t vectors, float* x) {
    const auto [query, head, see] = w.rows[r];
    const int64_t end = see.end - block;
    const f32x16 first = splat(static_cast<float>(see.begin - block));
    const f32x16 last = splat(static_cast<float>(end - 1));
    const bool masked = see.begin > block || end < vectors * kLanes;
    f32x16 top = splat(-kInf);
    if (!masked && a.softcap == 0 && !a.alibi_slopes && !a.bias.defined()) {
      for (int64_t v = 0; v < vectors; ++v) top = max(load(x + v * kLanes), top);
      return reduce_max(top);
    }
    for (int64_t v = 0; v < vectors; ++v) {
      f32x16 y = load(x + v * kLanes);
      const f32x16 j = load(kIota) + splat(static_cast<float>(v * kLanes));
      if (a.softcap > 0) y = tanh(y) * splat(a.softcap * kLog2e);
      if (a.alibi_slopes) {
        const float p = static_cast<float>(query + s.k_len - s.q_len - block);
        y = fma(abs(j - splat(p)), splat(-a.alibi_slopes[head] * kLog2e), y);
      }
      if (a.bias.defined() && end > v * kLanes)
        y = fma(load_bias(r, block + v * kLanes, end - v * kLanes), splat(kLog2e), y);
      if (masked) {
        y = select_less(j, first, splat(-kInf), y);
        y = select_less(last, j, splat(-kInf), y);
      }
      store(x + v * kLanes, y);
      top = max(y, top);
    }
    return reduce_max(top);
  }

  // Turns scores into weights, and returns their sums, lane by lane.
  static f32x16 weigh(float base, int64_t vectors, float* x) {
    f32x16 sum[2] = {zero(), zero()};
    const auto one = [&](int64_t v) {
      const f32x16 p = exp2(load(x + v * kLanes) - splat(base));
      store(x + v * kLanes, p);
      sum[v % 2] = sum[v % 2] + p;
    };
    int64_t v = 0;
    for (; v + 4 <= vectors; v += 4) one(v), one(v + 1), one(v + 2), one(v + 3);
    for (; v < vectors; ++v) one(v);
    return sum[0] + sum[1];
  }

  // Adds a block to the softmax of rows r to r + n.
  void attend_rows(Softmax& softmax, int64_t r, int64_t n, int64_t block) {
    Range any{block + kBlockKeys, block}, all{block, block + kBlockKeys};
    for (int64_t i = r; i < r + n; ++i) {
      const Range see = w.rows[i].visible;
      any = {smaller(any.begin, see.begin), larger(any.end, see.end)};
      all = {larger(all.begin, see.begin), smaller(all.end, see.end)};
    }
    any = {larger(any.begin, block), smaller(any.end, block + kBlockKeys)};
    if (any.begin >= any.end) return;
    const int64_t vectors = (any.end - block + kLanes - 1) / kLanes;
    const float* q = w.q + r * width;
    const auto score = [&](auto keys) { score_rows(q, width, keys, d, w.weights, n, vectors); };
    const int64_t here = block % kFound;
    if (keys_in_place)  // and this block's values, meanwhile
      score(KeyGroups<T>{k_groups + here / kLanes, a.k.stride[3], v_rows + here});
    else if (few)
      for (int64_t g = any.begin / kLanes * kLanes; g < any.end; g += kLanes) {
        const T* from[kLanes];
        const T* const* keys = group_rows(g, any, from);
        ask_ahead(g, any);
        dispatch_count<kTileRows>(n, [&](auto count) {
          score_keys<decltype(count)::value>(q, width, keys, d, w.weights + g - block);
        });
      }
    else
      score(KeyGroups<float>{k_copies, kBlockKeys, nullptr});

    alignas(64) float fade[kLanes] = {};
    float base[kTileRows];
    f32x16 sums[kTileRows];
    for (int64_t i = 0; i < n; ++i) {  // a loop for each: what a row waits for, others can use
      const float top = finish_scores(r + i, block, vectors, w.weights + i * kBlockKeys);
      const float before = softmax.maximum[r + i], maximum = top > before ? top : before;
      softmax.maximum[r + i] = maximum;
      base[i] = base_of(maximum);
      fade[i] = before - base[i];
    }
    for (int64_t i = 0; i < n; ++i) sums[i] = weigh(base[i], vectors, w.weights + i * kBlockKeys);
    store(fade, exp2(load(fade)));
    for (int64_t i = 0; i < n; ++i) {
      softmax.sum[r + i] = softmax.sum[r + i] * fade[i] + reduce_add(sums[i]);
      float* values = softmax.values + (r + i) * width;
      for (int64_t c = 0; c < width; c += kLanes)
        store(values + c, load(values + c) * splat(fade[i]));
    }
    // Together over the keys that all rows see; before and after those, each row on its own.
    if (all.begin >= all.end) all = {any.end, any.end};
    for (int64_t i = 0; i < n; ++i) {
      const Range see = w.rows[r + i].visible;
      add_values(softmax, r + i, 1, i, block, {see.begin, smaller(all.begin, see.end)});
    }
    add_values(softmax, r, n, 0, block, all);
    for (int64_t i = 0; i < n; ++i)
      add_values(softmax, r + i, 1, i, block, {all.end, w.rows[r + i].visible.end});
  }
  void add_values(Softmax& softmax, int64_t r, int64_t n, int64_t weights_row, int64_t block,
                  Range keys) {
    const int64_t begin = larger(keys.begin - block, 0);
    const int64_t end = smaller(keys.end - block, kBlockKeys);
    const float* weights = w.weights + weights_row * kBlockKeys;
    float* out = softmax.values + r * width;
    const T* const* next = k_rows + (block + kBlockKeys) % kFound;
    if (values_in_place)
      value_rows(weights, ValueRows<T>{v_rows + block % kFound, more ? next : nullptr}, begin, end,
                 width, out, width, n);
    else
      value_rows(weights, ValueRows<float>{v_copies, nullptr}, begin, end, width, out, width, n);
  }

  // The softmax over one split.
  void attend_split(Softmax& softmax, int64_t split, Range seen) {
    softmax.reset(rows, width);
    const int64_t begin = larger(seen.begin, split * kSplitKeys);
    const int64_t end = smaller(seen.end, (split + 1) * kSplitKeys);
    const auto keys_of = [&](int64_t block) {
      return Range{larger(begin, block), smaller(end, block + kBlockKeys)};
    };
    const int64_t first = begin / kBlockKeys * kBlockKeys;
    if (first < end) find_rows(keys_of(first));
    for (int64_t block = first; block < end; block += kBlockKeys) {
      more = block + kBlockKeys < end;
      if (more) find_rows(keys_of(block + kBlockKeys));
      load_block(block, keys_of(block));
      if (!has_queries) load_queries();
      for (int64_t r = 0; r < rows; r += kTileRows)
        attend_rows(softmax, r, smaller(rows - r, kTileRows), block);
    }
  }

  // Over the given split alone, storing partial results, or (-1) over all of them.
  void run(int64_t shared_split) {
    Range seen{s.k_len, 0};
    int64_t query = first_row / a.group, member = first_row % a.group;
    Range see = a.visible(s, query);
    for (int64_t r = 0; r < rows; ++r, ++member) {
      if (member == a.group) member = 0, see = a.visible(s, ++query);
      w.rows[r] = {query, kv_head * a.group + member, see};
      if (see.begin < see.end) seen = {smaller(seen.begin, see.begin), larger(seen.end, see.end)};
    }
    if (!few)
      for (int64_t j = 0; j < kBlockKeys / kLanes; ++j) k_copies[j] = w.keys + j * kLanes;
    if (!values_in_place)
      for (int64_t j = 0; j < kBlockKeys; ++j) v_copies[j] = w.values + j * width;
    each_query([&](int64_t, auto* q) { ask_for(q, d); });
    if (shared_split >= 0) {
      attend_split(w.split, shared_split, seen);
      for (int64_t r = 0; r < rows; ++r) {
        float* to = a.partial(s, w.rows[r].query, w.rows[r].head, shared_split);
        for (int64_t i = 0; i < width; i += kLanes)
          store(to + i, load(w.split.values + r * width + i));
        to[width] = w.split.maximum[r];
        to[width + 1] = w.split.sum[r];
      }
      return;
    }
    int64_t split = seen.begin / kSplitKeys;
    attend_split(w.total, split++, seen);
    for (; split * kSplitKeys < seen.end; ++split) {
      attend_split(w.split, split, seen);
      for (int64_t r = 0; r < rows; ++r)
        merge(w.total.maximum[r], w.total.sum[r], w.total.values + r * width, w.split.maximum[r],
              w.split.sum[r], w.split.values + r * width, width);
    }
    for (int64_t r = 0; r < rows; ++r)
      finish(a, s, w.rows[r].query, w.rows[r].head, w.total.maximum[r], w.total.sum[r],
             w.total.values + r * width);
  }
};

}  // namespace

void attention(const AttentionArgs& a, int64_t chunk) {
  static thread_local Workspace workspace;
  Sequence s = a.sequence(0);
  for (int64_t n; chunk >= (n = a.chunks_of(s)); chunk -= n) s = a.sequence(s.b + 1);
  int64_t shared_split = -1;
  if (a.shares_splits(s)) {
    const Range splits = a.splits(s);
    shared_split = splits.begin + chunk % (splits.end - splits.begin);
    chunk /= splits.end - splits.begin;
  }
  const auto run = [&](auto* type) {
    Tile<std::remove_pointer_t<decltype(type)>> tile(a, s, chunk % a.k.shape[2],
                                                     chunk / a.k.shape[2] * a.tile_rows, workspace);
    tile.run(shared_split);
  };
  if (a.k.dtype == DType::I8)
    run(static_cast<int8_t*>(nullptr));
  else
    dispatch_float(a.k.dtype, run);
}

}  // namespace pyllm::PYLLM_ISA

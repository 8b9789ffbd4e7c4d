// The floor: for one token the bytes of w over the bandwidth; for many, one vpdpbusd for 64 int8
// multiplications, and beside every eight of those a multiplication and one or two fma for the
// scale and the minimum, which bounds us at 80 or 73 % of the peak of vpdpbusd.
//
// One loop serves both, so a token's result does not depend on how many others come with it: up to
// kMaxTile tokens stay in L1 while the panels of the chunk pass, first from memory, then from L2.
// (Of the two ways to nest the loops this one also writes y in order.) Measured on Zen 4, for one
// token 97 % of read bandwidth, for 512 in a model 73 % of peak int8 without minima. A tile alone
// reaches 78 and 71 %, near its bound, and as much from L2 as from L1 also where 12 tokens and a
// panel overflow L1: blocks of K would gain nothing. For 8 tokens, weights in memory, 64 %.
// What helped: memory in large pages (one token); tiles that write y themselves, and chunks of few
// tokens, whose rows of x and y a core's own L2 holds (512 tokens: 5 % where the L3 is contended).
// What did not: to prefetch weights for one token, x or y for many, or further ahead than 2 KB.
#include "cpu/quant_matmul.h"

#include <type_traits>

#include "cpu/quant_tile.h"

namespace pyllm::PYLLM_ISA {
namespace {

using Tile = void (*)(const uint8_t* panel, ActivationRows x, TileOutput out);

// Fills tiles[1..kMaxTile].
template <class F, int MR = kMaxTile>
PYLLM_INLINE void list_tiles(Tile* tiles) {
  tiles[MR] = &tile<F, MR>;
  if constexpr (MR > 1) list_tiles<F, MR - 1>(tiles);
}

template <class T>
void store_tile(const QuantMatmulArgs& a, int64_t token, int tokens, int64_t n,
                float (*acc)[kLanes]) {
  const int64_t width = a.w.n - n;
  const f32x16 bias = a.bias.defined() ? load_n(a.bias.as<float>() + n, width) : zero();
  for (int t = 0; t < tokens; ++t) {
    const f32x16 sum = load(acc[t]);
    store_n(a.y.row<T>(token + t) + n, a.bias.defined() ? sum + bias : sum, width);
  }
}

template <class F>
void multiply(const QuantMatmulArgs& a, int64_t chunk) {
  Tile tiles[kMaxTile + 1];
  list_tiles<F>(tiles);
  const int64_t panel_chunks = a.panel_chunks();
  const int64_t first = chunk % panel_chunks * a.panels_per_chunk;
  const int64_t last = smaller(first + a.panels_per_chunk, a.w.panels());
  const int64_t begin = chunk / panel_chunks * a.tokens_per_chunk;
  const int64_t end = smaller(begin + a.tokens_per_chunk, a.x.shape[0]);
  const int64_t n_tiles = (end - begin + kMaxTile - 1) / kMaxTile;
  const bool direct = a.y.dtype == DType::F32 && !a.bias.defined();
  ActivationRows rows{nullptr, a.x.stride[0], {a.w.k, F::group_size}};
  for (int64_t i = 0; i < n_tiles; ++i) {  // of nearly equal size
    const int64_t token = begin + (end - begin) * i / n_tiles;
    const int tokens = static_cast<int>(begin + (end - begin) * (i + 1) / n_tiles - token);
    rows.data = a.x.row<uint8_t>(token);
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t n = panel * kLanes;
      const uint8_t* w = a.w.data + panel * a.w.panel_bytes();
      if (direct && n + kLanes <= a.w.n) {
        tiles[tokens](w, rows, {a.y.row<float>(token) + n, a.y.stride[0]});
        continue;
      }
      alignas(64) float acc[kMaxTile][kLanes];
      tiles[tokens](w, rows, {acc[0], kLanes});
      dispatch_float(a.y.dtype, [&](auto* t) {
        store_tile<std::remove_pointer_t<decltype(t)>>(a, token, tokens, n, acc);
      });
    }
  }
}

}  // namespace

void quant_matmul(const QuantMatmulArgs& a, int64_t chunk) {
  const bool minimum = a.w.has_minimum;
  if (a.w.bits == 4 && a.w.group_size == 32)
    return minimum ? multiply<Format<4, 32, true>>(a, chunk)
                   : multiply<Format<4, 32, false>>(a, chunk);
  if (a.w.bits == 4)
    return minimum ? multiply<Format<4, 16, true>>(a, chunk)
                   : multiply<Format<4, 16, false>>(a, chunk);
  if (a.w.group_size == 32)
    return minimum ? multiply<Format<8, 32, true>>(a, chunk)
                   : multiply<Format<8, 32, false>>(a, chunk);
  return minimum ? multiply<Format<8, 16, true>>(a, chunk)
                 : multiply<Format<8, 16, false>>(a, chunk);
}

}  // namespace pyllm::PYLLM_ISA

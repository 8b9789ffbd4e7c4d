// The register tiles of attention: a few rows by a few vectors, for any head dim and any ISA. In
// each the order of operations of one output element does not depend on the size of the tile.
#pragma once
#include "cpu/simd.h"

namespace pyllm::PYLLM_ISA {
namespace {

// What the registers hold: rows * vectors accumulators, the vectors of one operand, a broadcast. Of
// few rows it is more vectors: an accumulator waits some four cycles for its last addition.
#if defined(PYLLM_ISA_AVX512)
constexpr int kTileRows = 6, kTileVectors = 4, kFewRows = 3, kWideVectors = 7;
#elif defined(PYLLM_ISA_AVX2)
constexpr int kTileRows = 3, kTileVectors = 2, kFewRows = 1, kWideVectors = 4;
#else
constexpr int kTileRows = 3, kTileVectors = 1, kFewRows = 1, kWideVectors = 3;
#endif

constexpr int kBlockKeys = 128;  // keys between two rescalings of a row

template <int N>
struct Count {
  static constexpr int value = N;
};
// f(Count<n>()), for n from 1 to N.
template <int N, class F>
PYLLM_INLINE void dispatch_count(int64_t n, F f) {
  if constexpr (N > 1)
    if (n < N) return dispatch_count<N - 1>(n, f);
  f(Count<N>());
}

// Keys side by side in groups of sixteen: element i of key j of group g is at[g][i * stride + j].
// `ask` is null, or one row of memory a key to ask for meanwhile.
template <class K>
struct KeyGroups {
  const K* const* at;
  int64_t stride;
  const K* const* ask;
};
// Values: element i of key j is at[j][i]. `ask` likewise.
template <class T>
struct ValueRows {
  const T* const* at;
  const T* const* ask;
};
// Into L2: in its share of the L1 a core can wait for too few lines at a time.
template <class T>
PYLLM_INLINE void ask_for(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(p + i, 0, 2);
}

// scores[r][16 v + lane] = sum over i of q[r][i] * keys.at[v][i][lane], i ascending, in parts of
// 32: a chain of 256 additions would lose twice the digits that PyTorch's blocked sums lose.
template <int R, int V, class K>
void score_tile(const float* q, int64_t q_stride, KeyGroups<K> keys, int64_t d, float* scores) {
  for (int64_t part = 0; part < d; part += 32) {
    f32x16 sum[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] = zero();
    const int64_t end = smaller(part + 32, d);
    for (int64_t i = part; i < end; ++i) {
      f32x16 k[V];
      for (int v = 0; v < V; ++v) k[v] = load(keys.at[v] + i * keys.stride);
      if (keys.ask)
        for (int64_t j = i; j < V * kLanes; j += d) ask_for(keys.ask[j], d);
      for (int r = 0; r < R; ++r) {
        const f32x16 x = splat(q[r * q_stride + i]);
        for (int v = 0; v < V; ++v) sum[r][v] = fma(x, k[v], sum[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        float* to = scores + r * kBlockKeys + v * kLanes;
        store(to, part == 0 ? sum[r][v] : load(to) + sum[r][v]);
      }
  }
}

template <class K>
PYLLM_INLINE void score_rows(const float* q, int64_t q_stride, KeyGroups<K> keys, int64_t d,
                             float* scores, int64_t rows, int64_t vectors) {
  for (int64_t v = 0; v < vectors; v += kTileVectors)
    dispatch_count<kTileRows>(rows, [&](auto r) {
      dispatch_count<kTileVectors>(vectors - v, [&](auto n) {
        score_tile<decltype(r)::value, decltype(n)::value, K>(
            q, q_stride, {keys.at + v, keys.stride, keys.ask ? keys.ask + v * kLanes : nullptr}, d,
            scores + v * kLanes);
      });
    });
}

// out[r][i] += sum over keys j of weights[r][j] * values.at[j][i], j ascending from begin to end.
template <int R, int V, class T>
void value_tile(const float* weights, ValueRows<T> values, int64_t begin, int64_t end,
                int64_t column, float* out, int64_t out_stride) {
  f32x16 sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = load(out + r * out_stride + column + v * kLanes);
  for (int64_t j = begin; j < end; ++j) {
    f32x16 x[V];
    for (int v = 0; v < V; ++v) x[v] = load(values.at[j] + column + v * kLanes);
    if (values.ask) ask_for(values.ask[j] + column, V * kLanes);
    for (int r = 0; r < R; ++r) {
      const f32x16 w = splat(weights[r * kBlockKeys + j]);
      for (int v = 0; v < V; ++v) sum[r][v] = fma(w, x[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(out + r * out_stride + column + v * kLanes, sum[r][v]);
}

template <class T>
PYLLM_INLINE void value_rows(const float* weights, ValueRows<T> values, int64_t begin, int64_t end,
                             int64_t padded_dim, float* out, int64_t out_stride, int64_t rows) {
  if (begin >= end) return;
  const int64_t vectors = padded_dim / kLanes;
  if (rows <= kFewRows && vectors > kTileVectors && vectors <= kWideVectors)
    return dispatch_count<kFewRows>(rows, [&](auto r) {
      constexpr int kRows = decltype(r)::value;
      dispatch_count<kWideVectors>(vectors, [&](auto n) {
        constexpr int kVectors = decltype(n)::value;
        if constexpr (kVectors > kTileVectors)
          value_tile<kRows, kVectors>(weights, values, begin, end, 0, out, out_stride);
      });
    });
  for (int64_t v = 0; v < vectors; v += kTileVectors)
    dispatch_count<kTileRows>(rows, [&](auto r) {
      dispatch_count<kTileVectors>(vectors - v, [&](auto n) {
        value_tile<decltype(r)::value, decltype(n)::value>(weights, values, begin, end, v * kLanes,
                                                           out, out_stride);
      });
    });
}

// block[i][j] = rows[j][column + i] in float32 for 16 keys j, zeros from column d.
template <class T>
PYLLM_INLINE void load_transposed(const T* const* rows, int64_t column, int64_t d,
                                  f32x16 (&block)[kLanes]) {
  if (d - column >= kLanes)
    for (int j = 0; j < kLanes; ++j) block[j] = load(rows[j] + column);
  else
    for (int j = 0; j < kLanes; ++j) block[j] = load_n(rows[j] + column, d - column);
  transpose(block);
}
#if defined(PYLLM_ISA_AVX512)
// Halves of two rows are put together as they are loaded: three stages of shuffles and not four.
PYLLM_INLINE void load_transposed(const float* const* rows, int64_t column, int64_t d,
                                  f32x16 (&block)[kLanes]) {
  if (d - column < kLanes) return load_transposed<float>(rows, column, d, block);
  for (int h = 0; h < 2; ++h) {  // eight columns
    __m512 w[2][4];
    for (int a = 0; a < 2; ++a) {  // of eight rows
      __m512 z[4], t[4];
      for (int i = 0; i < 4; ++i) {
        const float* low = rows[8 * a + i] + column + 8 * h;
        const float* high = rows[8 * a + 4 + i] + column + 8 * h;
        z[i] = _mm512_mask_broadcast_f32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low)), 0xff00,
                                           _mm256_loadu_ps(high));
      }
      for (int i = 0; i < 4; i += 2) {
        t[i] = _mm512_unpacklo_ps(z[i], z[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(z[i], z[i + 1]);
      }
      for (int i = 0; i < 2; ++i) {
        const __m512d x = _mm512_castps_pd(t[i]), y = _mm512_castps_pd(t[i + 2]);
        w[a][2 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
        w[a][2 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
      }
    }
    // w[a][i]: columns i and 4 + i of rows 8 a to 8 a + 3, then of the next four.
    for (int i = 0; i < 4; ++i) {
      block[8 * h + i].v = _mm512_shuffle_f32x4(w[0][i], w[1][i], 0x88);
      block[8 * h + 4 + i].v = _mm512_shuffle_f32x4(w[0][i], w[1][i], 0xdd);
    }
  }
}
#endif

// keys[i][j] = rows[j][i]; d padded with zeros to whole vectors.
template <class T>
void transpose_keys(const T* const* rows, int64_t d, float* keys) {
  for (int64_t i = 0; i < d; i += kLanes) {
    f32x16 block[kLanes];
    load_transposed(rows, i, d, block);
    for (int j = 0; j < kLanes; ++j) store(keys + (i + j) * kBlockKeys, block[j]);
  }
}

// What score_tile makes of 16 keys, without a copy: rows[j] is key j.
template <int R, class T>
void score_keys(const float* q, int64_t q_stride, const T* const* rows, int64_t d, float* scores) {
  for (int64_t part = 0; part < d; part += 32) {
    f32x16 sum[R];
    for (int r = 0; r < R; ++r) sum[r] = zero();
    const int64_t end = smaller(part + 32, d);
    for (int64_t i = part; i < end; i += kLanes) {
      f32x16 block[kLanes];
      load_transposed(rows, i, d, block);
      const auto add = [&](int j) {
        for (int r = 0; r < R; ++r) sum[r] = fma(splat(q[r * q_stride + i + j]), block[j], sum[r]);
      };
      if (end - i >= kLanes)
        for (int j = 0; j < kLanes; ++j) add(j);
      else
        for (int j = 0; j < kLanes; ++j)
          if (i + j < end) add(j);
    }
    for (int r = 0; r < R; ++r) {
      float* to = scores + r * kBlockKeys;
      store(to, part == 0 ? sum[r] : load(to) + sum[r]);
    }
  }
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA

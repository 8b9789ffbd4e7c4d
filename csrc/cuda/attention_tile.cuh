// What flash_attention and paged_attention do with a tile: 16 or 32 rows of queries a warp against
// blocks of keys and values that all warps of the block share.
//
// A row is one query of one head. Everything about a row is computed by the four lanes of a quad,
// from that row and the keys alone and in an order that the size of the tile does not change, so
// the same bits come out of a tile of one warp and of four.
//
// Keys and values take turns: while q k is computed the values are on their way, while the softmax
// and p v are, the next keys. Rows of tiles are stored in chunks of 16 bytes, swizzled so that
// neither the copies nor ldmatrix meet in a bank.
#pragma once
#include "cuda/attention_logits.cuh"

namespace pyllm::cuda {

// The rows of a warp as registers hold them: of each 16, a lane has rows g = lane / 4 and g + 8,
// and of each 8 columns 2 (lane % 4) and the next.
template <class S>
struct RowState {
  float o[S::M][S::kDim / 8][4];  // sums of weights times values
  float top[S::M][2];             // the largest logit so far
  float sum[S::M][2];             // of weights, of this lane's columns only until `close`

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < S::M; ++m) {
#pragma unroll
      for (int n = 0; n < S::kDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[m][n][i] = 0.0f;
#pragma unroll
      for (int h = 0; h < 2; ++h) top[m][h] = kMinusInfinity, sum[m][h] = 0.0f;
    }
  }
  __device__ __forceinline__ void close() {
#pragma unroll
    for (int m = 0; m < S::M; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[m][h] += __shfl_xor_sync(0xffffffffu, sum[m][h], 1);
        sum[m][h] += __shfl_xor_sync(0xffffffffu, sum[m][h], 2);
      }
  }
};

// Where chunk `chunk` of row `row` is in a tile.
template <int Dim>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * Dim + ((chunk ^ (row & 7)) << 3);
}

// f(row, chunk) for the chunks of a tile that this thread copies.
template <int Threads, int Rows, int Chunks, class F>
__device__ __forceinline__ void for_own_chunks(F f) {
#pragma unroll 1  // saves the registers that would hold addresses
  for (int row = threadIdx.x / Chunks; row < Rows; row += Threads / Chunks)
    f(row, threadIdx.x % Chunks);
}

// Starts copying rows of `dim` elements to a tile; at(row) says where a row is, or null: zeros.
template <class S, int Rows, class T, class At>
__device__ __forceinline__ void copy_rows(T* tile, const T* anywhere, int dim, At at) {
  for_own_chunks<S::kThreads, Rows, S::kChunks>([&](int row, int chunk) {
    const T* from = at(row);
    const bool real = from && chunk * 8 < dim;
    cp_async<16>(tile + swizzled<S::kDim>(row, chunk), real ? from + chunk * 8 : anywhere,
                 real ? 16 : 0);
  });
}

// Makes zeros of the infinities and NaN among the values that this thread copied: a row that does
// not see a key multiplies its value with 0, and 0 * inf is NaN. Returns whether there were any;
// `sum_non_finite` makes up for them.
template <class S>
__device__ __forceinline__ bool drop_non_finite(typename S::T* values) {
  constexpr uint32_t kInfinity = std::is_same_v<typename S::T, f16> ? 0x7c00 : 0x7f80;
  bool dropped = false;
  for_own_chunks<S::kThreads, S::kKeys, S::kChunks>([&](int row, int chunk) {
    auto* const at = values + swizzled<S::kDim>(row, chunk);
    auto pairs = load<Vec<uint32_t, 4>>(at);
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // The top bit of each half: whether its exponent is all ones.
      const uint32_t is =
          ((pairs[i] & 0x7fff7fffu) + (0x8000 - kInfinity) * 0x10001u) & 0x80008000u;
      any |= is;
      pairs[i] &= ~((is >> 15) * 0xffffu);
    }
    if (any) store(at, pairs), dropped = true;
  });
  return dropped;
}

template <class S>
__device__ __forceinline__ void clear(float (&s)[S::M][S::kKeys / 8][4]) {
#pragma unroll
  for (int m = 0; m < S::M; ++m)
#pragma unroll
    for (int n = 0; n < S::kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
}

// s = q k
template <class S>
__device__ __forceinline__ void multiply_keys(float (&s)[S::M][S::kKeys / 8][4],
                                              const typename S::T* q, const typename S::T* k) {
  const int lane = opaque(lane_id());  // or the addresses of the whole tile would be kept
  q += threadIdx.x / 32 * S::kWarpRows * S::kDim;
  clear<S>(s);
#pragma unroll
  for (int c = 0; c < S::kDim / 16; ++c) {
    uint32_t a[S::M][4];
#pragma unroll
    for (int m = 0; m < S::M; ++m)
      ldmatrix<4>(a[m], q + swizzled<S::kDim>(m * 16 + lane % 16, 2 * c + lane / 16));
#pragma unroll
    for (int n = 0; n < S::kKeys / 16; ++n) {
      uint32_t b[4];
      ldmatrix<4>(b,
                  k + swizzled<S::kDim>(n * 16 + lane % 8 + lane / 16 * 8, 2 * c + lane / 8 % 2));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < S::M; ++m) {
        mma_m16n8k16<typename S::T>(s[m][2 * n], a[m], low);
        mma_m16n8k16<typename S::T>(s[m][2 * n + 1], a[m], high);
      }
    }
  }
}

// o += p v; p packed to pairs.
template <class S>
__device__ __forceinline__ void multiply_values(RowState<S>& state,
                                                const uint32_t (&p)[S::kKeys / 16][S::M][4],
                                                const typename S::T* v) {
  const int lane = opaque(lane_id());
#pragma unroll
  for (int k = 0; k < S::kKeys / 16; ++k)
#pragma unroll
    for (int n = 0; n < S::kDim / 16; ++n) {
      uint32_t b[4];
      ldmatrix<4, true>(b, v + swizzled<S::kDim>(k * 16 + lane % 16, 2 * n + lane / 16));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < S::M; ++m) {
        mma_m16n8k16<typename S::T>(state.o[m][2 * n], p[k][m], low);
        mma_m16n8k16<typename S::T>(state.o[m][2 * n + 1], p[k][m], high);
      }
    }
}

// The sum of the infinities and NaN among value(key), for keys from begin to end.
template <class Value>
__device__ __forceinline__ float sum_non_finite(int begin, int end, Value value) {
  float sum = 0.0f;
#pragma unroll 1
  for (int key = begin; key < end; ++key) {
    const float x = value(key);
    if (!(fabsf(x) < INFINITY)) sum += x;
  }
  return sum;
}

// One step of the online softmax (Milakov and Gimelshein, 2018): weights exp2(scale * s - top) in
// pairs, and what was summed so far brought to the new top.
template <class S>
__device__ __forceinline__ void weigh(RowState<S>& state, uint32_t (&p)[S::kKeys / 16][S::M][4],
                                      const float (&s)[S::M][S::kKeys / 8][4], float scale) {
  constexpr int kBlocks = S::kKeys / 8;
  bool rescale = false;
  float alpha[S::M][2];
#pragma unroll
  for (int m = 0; m < S::M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = s[m][0][2 * h];
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) top = fmaxf(fmaxf(top, s[m][n][2 * h]), s[m][n][2 * h + 1]);
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      top = fmaxf(top, state.top[m][h]);
      const float base = top == kMinusInfinity ? 0.0f : top * scale;
      const bool higher = top != state.top[m][h];
      alpha[m][h] = higher ? exp2_approx((state.top[m][h] - top) * scale) : 1.0f;
      rescale |= higher;
      state.top[m][h] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        const float x = exp2_approx(fmaf(s[m][n][2 * h], scale, -base));
        const float y = exp2_approx(fmaf(s[m][n][2 * h + 1], scale, -base));
        sum += x + y;
        p[n / 2][m][n % 2 * 2 + h] = pack<typename S::T>(x, y);
      }
      state.sum[m][h] = fmaf(state.sum[m][h], alpha[m][h], sum);
    }
  // Where no row of the warp found a larger logit, every alpha is 1.
  if (!__any_sync(0xffffffffu, rescale)) return;
#pragma unroll
  for (int m = 0; m < S::M; ++m)
#pragma unroll
    for (int n = 0; n < S::kDim / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) state.o[m][n][i] *= alpha[m][i / 2];
}

// Runs the keys of [from, to), `from` a multiple of kKeys, past the rows of the tile, whose first
// is `first_row` of the sequence. `source` brings them to shared memory: copy_keys(key) and
// copy_values(key) start copying a block; after a wait come values_landed(partly) and a barrier,
// then keys() and values(partly) give the tile. `partly`: some rows do not see some of the keys.
// With Options logits are in units of log 2, else `scale` brings them there.
template <class S, bool Options, class Source>
__device__ __forceinline__ void attend(RowState<S>& state, const typename S::T* q, Source& source,
                                       const View& view, const LogitOptions& options, int first_row,
                                       int first_head, int from, int to) {
  const int warp_row = first_row + threadIdx.x / 32 * S::kWarpRows;
  const Span seen(view, first_row, first_row + S::kRows - 1);
  const Span seen_by_warp(view, warp_row, warp_row + S::kWarpRows - 1);
  const float scale = Options ? 1.0f : options.scale * kLog2e;
  const int begin = max(from, seen.begin / S::kKeys * S::kKeys), end = min(to, seen.end);
  if (begin >= end) return;
  source.copy_keys(begin);
  cp_async_commit();
#pragma unroll 1
  for (int key = begin; key < end; key += S::kKeys) {
    float s[S::M][S::kKeys / 8][4];
    const bool busy = seen_by_warp.sees(key, S::kKeys);
    const bool partly = seen.hides(key, S::kKeys) || (Options && options.bias);
    cp_async_wait<0>();
    __syncthreads();  // the keys are there, and nobody reads the values before any more
    source.copy_values(key);
    cp_async_commit();
    const auto* k = source.keys();
    if (busy) {
      multiply_keys<S>(s, q, k);
      if constexpr (Options) apply_options<S>(s, key, view, options, first_row, first_head);
      if (partly) hide<S>(s, key, view, first_row);
    } else {
      clear<S>(s);  // or its registers would count as used in all of the loop
    }
    cp_async_wait<0>();
    source.values_landed(partly);
    __syncthreads();  // the values are there, and nobody reads the keys any more
    if (key + S::kKeys < end) source.copy_keys(key + S::kKeys);
    cp_async_commit();
    const auto* v = source.values(partly);
    if (busy) {
      uint32_t p[S::kKeys / 16][S::M][4];
      weigh<S>(state, p, s, scale);
      multiply_values<S>(state, p, v);
    }
  }
}

// A row's end: what its sums are multiplied with, and the log-sum-exp, from its largest logit and
// its sum of weights; the sink is one more logit that has no value. In units of log 2.
struct RowEnd {
  float factor, lse;
  __device__ __forceinline__ RowEnd(float top, float sum, float sink) {
    const float highest = fmaxf(top, sink);
    const float base = highest == kMinusInfinity ? 0.0f : highest;
    const float own = exp2_approx(top - base);
    const float total = fmaf(sum, own, exp2_approx(sink - base));
    factor = total == 0.0f ? 0.0f : __fdividef(own, total);
    lse = total == 0.0f ? kMinusInfinity : (base + log2f(total)) * kLn2;
  }
};

}  // namespace pyllm::cuda

// Which keys the rows of a tile see, and what becomes of their logits.
#pragma once
#include "cuda/primitives.cuh"

namespace pyllm::cuda {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr float kMinusInfinity = -INFINITY;

// T: f16 or bf16. Dim: head dim that registers and tiles hold, a power of two from 64; the chunks
// beyond the real one are zeros. M: tiles of 16 rows a warp.
template <class T_, int Dim, int Warps, int M_>
struct TileShape {
  using T = T_;
  static constexpr int kDim = Dim, M = M_;
  static constexpr int kThreads = 32 * Warps, kWarpRows = 16 * M, kRows = kWarpRows * Warps;
  static constexpr int kKeys = Dim > 128 ? 32 : Dim * M > 128 ? 48 : 64;  // of a block
  static constexpr int kChunks = Dim / 8;                                 // of 16 bytes, a row
  static constexpr int kQueryElements = kRows * Dim, kKeyElements = kKeys * Dim;
};

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
// The row of the tile of this lane's half h of rows m.
template <class S>
__device__ __forceinline__ int tile_row(int m, int h) {
  return threadIdx.x / 32 * S::kWarpRows + m * 16 + h * 8 + lane_id() / 4;
}

// Which keys the rows of a tile see. Row r is query r / heads of the sequence.
struct View {
  int rows, heads;  // of the sequence, with `heads` heads to a query
  int offset;       // query i stands at key i + offset
  int keys;         // of the sequence
  int left, right;  // keys seen beside one's own, -1: all

  __device__ __forceinline__ int position(int row) const { return row / heads + offset; }
  __device__ __forceinline__ int begin(int position) const {
    return left < 0 ? 0 : max(position - left, 0);
  }
  __device__ __forceinline__ int end(int position) const {
    return right < 0 || position > keys - 1 - right ? keys : max(position + right + 1, 0);
  }
};

// What the rows of `first` to `last` see: from `begin` to `end` some do, from `all_begin` to
// `all_end` all do.
struct Span {
  int begin, end, all_begin, all_end;
  __device__ __forceinline__ Span(const View& view, int first, int last) {
    last = min(last, view.rows - 1);
    const int low = view.position(first), high = view.position(last);
    begin = view.begin(low), end = first > last ? 0 : view.end(high);
    all_begin = view.begin(high), all_end = view.end(low);
  }
  __device__ __forceinline__ bool sees(int key, int n) const {
    return key < end && key + n > begin;
  }
  __device__ __forceinline__ bool hides(int key, int n) const {
    return key < all_begin || key + n > all_end;
  }
};

// What becomes of a logit q k, besides the scale: all in units of log 2, for exp2.
struct LogitOptions {
  float scale, softcap;  // softcap 0: none
  const float* alibi_slopes;
  const void* bias;
  int64_t bias_stride[2];  // between heads and between queries; between keys it is 1
  DType bias_dtype;
};

// f(row of the tile, this lane's first key)(element, key after that) over the logits s of the keys
// from `key` on.
template <class S, class F>
__device__ __forceinline__ void for_logits(float (&s)[S::M][S::kKeys / 8][4], int key, F f) {
#pragma unroll
  for (int m = 0; m < S::M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      auto g = f(tile_row<S>(m, h), key + lane_id() % 4 * 2);
#pragma unroll
      for (int n = 0; n < S::kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) g(s[m][n][2 * h + i], n * 8 + i);
    }
}

// The bias of a row and a key; that of the last row for the rows that pad a tile.
__device__ __forceinline__ float bias(const LogitOptions& options, const View& view, int row,
                                      int first_head, int key) {
  row = min(row, view.rows - 1);
  const int64_t at = (first_head + row % view.heads) * options.bias_stride[0] +
                     row / view.heads * options.bias_stride[1] + key;
  if (options.bias_dtype == DType::F32)
    return load<float>(static_cast<const float*>(options.bias) + at);
  if (options.bias_dtype == DType::F16)
    return float_of(load<f16>(static_cast<const f16*>(options.bias) + at));
  return float_of(load<bf16>(static_cast<const bf16*>(options.bias) + at));
}

// Scale and options; the logits are in units of log 2 then. Rows from first_row of the sequence,
// whose heads begin at first_head.
template <class S>
__device__ __forceinline__ void apply_options(float (&s)[S::M][S::kKeys / 8][4], int key,
                                              const View& view, const LogitOptions& options,
                                              int first_row, int first_head) {
  if (options.softcap > 0.0f) {
    // tanh y = 1 - 2 / (e^2y + 1)
    const float in = options.scale * (2 * kLog2e) / options.softcap, out = options.softcap * kLog2e;
    for_logits<S>(s, key, [&](int, int) {
      return
          [&](float& x, int) { x = out * (1.0f - __fdividef(2.0f, exp2_approx(x * in) + 1.0f)); };
    });
  } else {
    const float scale = options.scale * kLog2e;
    for_logits<S>(s, key, [&](int, int) { return [&](float& x, int) { x *= scale; }; });
  }
  if (options.alibi_slopes)
    for_logits<S>(s, key, [&](int r, int first) {
      const int row = min(first_row + r, view.rows - 1), distance = view.position(row) - first;
      const float slope = options.alibi_slopes[first_head + row % view.heads] * -kLog2e;
      return [=](float& x, int k) { x = fmaf(slope, fabsf(static_cast<float>(distance - k)), x); };
    });
  if (options.bias)
    for_logits<S>(s, key, [&](int r, int first) {
      return [&, r, first](float& x, int k) {
        if (first + k < view.keys)
          x = fmaf(bias(options, view, first_row + r, first_head, first + k), kLog2e, x);
      };
    });
}

template <class S>
__device__ __forceinline__ void hide(float (&s)[S::M][S::kKeys / 8][4], int key, const View& view,
                                     int first_row) {
  for_logits<S>(s, key, [&](int r, int first) {
    const int position = view.position(first_row + r);
    const int begin = view.begin(position) - first, end = view.end(position) - first;
    return [=](float& x, int k) { x = k < begin || k >= end ? kMinusInfinity : x; };
  });
}

}  // namespace pyllm::cuda

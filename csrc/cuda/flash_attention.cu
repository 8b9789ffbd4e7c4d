// FlashAttention-2 (Dao, 2023, arXiv:2307.08691): a block of four warps keeps the sums of its rows
// in registers and streams the keys and values past them once.
//
// The floor is 4 * D operations for each pair of a query and a key that it sees: 1.1 ms for causal
// attention, D = 128, 16 heads, 16,384 tokens at the 989 TFLOP/s of an H100, of which mma.sync gets
// about 62 %. Bytes do not matter there: keys and values come from L2, once a tile.
//
// Predicted for an H100, not yet measured: a block of 128 rows x 48 keys x D = 128 takes 1240
// cycles of the tensor cores, 1220 of shared memory, 1150 of issue and 380 of exp2; two blocks a
// multiprocessor overlap these to 65 - 70 %: 380 TFLOP/s, +- 10 %, 2.9 ms.
//
// Decided: 32 rows a warp for D <= 128, for 16 would make shared memory the limit (each fragment of
// keys serves twice as many rows). 48 keys a block there, for 64 need more than 255 registers. D is
// rounded up to 64, 128 or 256; options that change logits have instances of their own with half
// the rows, for they cost registers: 2 dtypes x 3 x 2 = 12 instances in all. Keys are not split
// over blocks: few queries over many keys are paged_attention's.
#include "cuda/attention_batch.cuh"
#include "cuda/dispatch.cuh"
#include "cuda/flash_attention.h"

namespace pyllm::cuda {
namespace {

// The keys and values of a sequence of a tensor.
template <class S>
struct Contiguous {
  using T = typename S::T;
  const T *k, *v;
  int64_t k_stride, v_stride;
  int n, dim;
  T *k_tile, *v_tile;
  bool dropped = false;  // infinities or NaN among values were left out

  __device__ __forceinline__ void copy(T* tile, const T* from, int64_t stride, int key) const {
    copy_rows<S, S::kKeys>(tile, from, dim, [&](int row) {
      return key + row < n ? from + (key + row) * stride : nullptr;
    });
  }
  __device__ __forceinline__ void copy_keys(int key) { copy(k_tile, k, k_stride, key); }
  __device__ __forceinline__ void copy_values(int key) { copy(v_tile, v, v_stride, key); }
  __device__ __forceinline__ void values_landed(bool partly) {
    if (partly) dropped |= drop_non_finite<S>(v_tile);
  }
  __device__ __forceinline__ const T* keys() const { return k_tile; }
  __device__ __forceinline__ const T* values(bool) const { return v_tile; }
};

// What a block works on: block (x, y) has a tile of the rows of `packed` heads from head y * packed
// on. Tiles of a sequence run backwards: under a causal mask the longest come first.
template <class S>
struct Place {
  using T = typename S::T;
  const FlashAttentionArgs& a;
  int packed, b, first_row;
  Piece queries, keys;

  __device__ __forceinline__ Place(const FlashAttentionArgs& a, int packed, int tiles, int tile)
      : a(a),
        packed(packed),
        queries(0, static_cast<int>(a.q.shape[1])),
        keys(0, static_cast<int>(a.k.shape[1])) {
    if (a.cu_seqlens_q) {
      const int all_queries = queries.length, all_keys = keys.length;
      b = find_sequence(a.cu_seqlens_q, a.batch, all_queries, packed, S::kRows, tile);
      if (b < 0) return;
      queries = Piece(a.cu_seqlens_q, b, all_queries);
      keys = Piece(a.cu_seqlens_k, b, all_keys);
      tiles = (queries.length * packed + S::kRows - 1) / S::kRows;
    } else {
      b = tile / tiles;
      tile %= tiles;
    }
    first_row = (tiles - 1 - tile) * S::kRows;
  }
  __device__ __forceinline__ int head() const { return blockIdx.y * packed; }
  __device__ __forceinline__ View view() const {
    return {queries.length * packed,
            packed,
            keys.length - queries.length,
            keys.length,
            a.left,
            a.right};
  }
  __device__ __forceinline__ RowsOf<T> rows(const Tensor& t) const {
    T* data = static_cast<T*>(t.data) + b * t.stride[0] + queries.begin * t.stride[1] +
              head() * t.stride[2];
    return {data, t.stride[1], t.stride[2], first_row, queries.length * packed, packed};
  }
  __device__ __forceinline__ const T* sequence(const Tensor& t) const {
    const int group = static_cast<unsigned>(a.q.shape[2]) / static_cast<unsigned>(a.k.shape[2]);
    return static_cast<const T*>(t.data) + b * t.stride[0] + keys.begin * t.stride[1] +
           head() / group * t.stride[2];
  }
  __device__ __forceinline__ LogitOptions options() const {
    return {a.scale,
            a.softcap,
            a.alibi_slopes,
            a.bias.data ? static_cast<const char*>(a.bias.data) +
                              b * a.bias.stride[0] * (a.bias.dtype == DType::F32 ? 4 : 2)
                        : nullptr,
            {a.bias.stride[1], a.bias.stride[2]},
            a.bias.dtype};
  }
  // Where the log-sum-exp of a row goes.
  __device__ __forceinline__ float* lse(int row) const {
    const int64_t token = a.cu_seqlens_q ? queries.begin : b * a.q.shape[1];
    return a.lse + (token + row / packed) * a.q.shape[2] + head() + row % packed;
  }
};

template <class S, bool Options>
__global__ void __launch_bounds__(S::kThreads, 2)
    flash_attention_kernel(const __grid_constant__ FlashAttentionArgs a, int packed, int tiles) {
  using T = typename S::T;
  T* const tile = dynamic_shared<T>();
  const int dim = static_cast<int>(a.q.shape[3]);
  RowState<S> state;
  state.clear();
  bool dropped;
  {
    const Place<S> place(a, packed, tiles, blockIdx.x);
    if (place.b < 0) return;
    const auto queries = place.rows(a.q);
    copy_rows<S, S::kRows>(tile, queries.data, dim, queries);
    cp_async_commit();
    Contiguous<S> source{place.sequence(a.k),
                         place.sequence(a.v),
                         a.k.stride[1],
                         a.v.stride[1],
                         place.keys.length,
                         dim,
                         tile + S::kQueryElements,
                         tile + S::kQueryElements + S::kKeyElements};
    attend<S, Options>(state, tile, source, place.view(), place.options(), place.first_row,
                       place.head(), 0, place.keys.length);
    dropped = source.dropped;
  }
  state.close();

  // Finding the place again is cheaper than registers that keep it meanwhile.
  const Place<S> place(a, packed, tiles, opaque(blockIdx.x));
  const View view = place.view();
  const float unit = Options ? 1.0f : a.scale * kLog2e;
  const auto factor = [&](int m, int h) {
    const int row = place.first_row + tile_row<S>(m, h);
    if (row >= view.rows) return 0.0f;
    const float sink = a.sinks ? a.sinks[place.head() + row % packed] * kLog2e : kMinusInfinity;
    const RowEnd end(state.top[m][h] * unit, state.sum[m][h], sink);
    if (a.lse && lane_id() % 4 == 0) *place.lse(row) = end.lse;
    return end.factor;
  };
  const auto dropped_sum = [&](int r, int column) {
    const int row = place.first_row + r, position = view.position(row);
    const T* const v = place.sequence(a.v) + column;
    const LogitOptions options = place.options();
    return sum_non_finite(view.begin(position), view.end(position), [&](int key) {
      if (Options && options.bias && bias(options, view, row, place.head(), key) == kMinusInfinity)
        return 0.0f;
      return float_of(load<T>(v + key * a.v.stride[1]));
    });
  };
  write_rows<S>(state, dropped, factor, tile, dim, place.rows(a.out), dropped_sum);
}

template <class T, int Dim, bool Options>
Status launch_tiles(const FlashAttentionArgs& a, Stream stream) {
  // Rows of 32 a warp use each fragment of keys and values twice; for a head dim of 256, or with
  // options, the registers are too few.
  using S = TileShape<T, Dim, 4, (Dim > 128 || Options) ? 1 : 2>;
  const int64_t heads = a.q.shape[2], group = heads / a.k.shape[2];
  // Few queries: the heads that share keys share a tile.
  const int64_t queries = a.cu_seqlens_q ? a.q.shape[1] / a.batch : a.q.shape[1];
  const int64_t packed = queries * 2 <= S::kRows ? group : 1;
  const int64_t rows = a.q.shape[1] * packed;
  const int64_t tiles = (rows + S::kRows - 1) / S::kRows;
  const int64_t blocks = a.cu_seqlens_q ? rows / S::kRows + a.batch : tiles * a.batch;
  if (rows >= 1LL << 31 || blocks >= 1LL << 31 || heads / packed > 65535)
    return "flash_attention: expected fewer than 2^31 rows and tiles and 2^16 heads";
  return launch("flash_attention", flash_attention_kernel<S, Options>,
                dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(heads / packed)),
                dim3(S::kThreads), sizeof(T) * (S::kQueryElements + 2 * S::kKeyElements), stream, a,
                static_cast<int>(packed), static_cast<int>(tiles));
}

template <class T, bool Options>
Status launch_dim(const FlashAttentionArgs& a, Stream stream) {
  if (a.q.shape[3] <= 64) return launch_tiles<T, 64, Options>(a, stream);
  if (a.q.shape[3] <= 128) return launch_tiles<T, 128, Options>(a, stream);
  return launch_tiles<T, 256, Options>(a, stream);
}

}  // namespace

Status flash_attention(const FlashAttentionArgs& a, Stream stream) {
  // The largest logit times a scale is the largest scaled logit only for a positive scale.
  const bool options = a.softcap > 0 || a.alibi_slopes || a.bias.data || !(a.scale > 0);
  const bool half = a.q.dtype == DType::F16;
  if (options) return half ? launch_dim<f16, true>(a, stream) : launch_dim<bf16, true>(a, stream);
  return half ? launch_dim<f16, false>(a, stream) : launch_dim<bf16, false>(a, stream);
}

}  // namespace pyllm::cuda

// Decoding, and prompts in pieces: the rows of a tile are the queries times the heads that share a
// KV head, so that keys and values are read once for all of them.
//
// The floor is the bytes of the keys and values: 256 KiB for 512 keys of a KV head with D = 128 in
// halves, 20 us for 16 sequences of 8192 keys and one KV head at the 3.35 TB/s of an H100; half of
// it for bytes. A split's partial sums add 0.4 % a row that shares the keys, written and read back.
//
// Predicted for an H100, not yet measured: 85 % of the bandwidth for halves from 8192 keys at a
// batch of 16 with 8 KV heads on. A block of one warp has 16 KiB of keys or values on their way at
// any time; by shared memory 6 of them fit a multiprocessor, which needs 18 KiB for latency times
// bandwidth. 70 % for caches of bytes: widening them costs 48 bytes of shared memory traffic for 8
// loaded ones, 70 % of what there is. Prompts in pieces: 16 rows a warp make shared memory the
// limit, 300 TFLOP/s.
//
// Decided: a result must not depend on how a prompt is cut, so decoding and prompts do the same
// operations. Hence one kernel whose tile is a warp's, in blocks of one warp for decoding and of
// four (two for D = 256) for prompts; sums start afresh each 512 keys and are put together in
// order, by the block or by a second kernel. Instances: 2 dtypes x 3 head dims x (halves, bytes) x
// (decoding, prompts) = 24, int8 and float8 told apart at run time, and 6 that combine.
#include "cuda/dispatch.cuh"
#include "cuda/paged_cache.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kSplitKeys = PagedAttentionPlan::kSplitKeys;

// The sum of the infinities and NaN among a column of the values that a row sees.
template <class T>
__device__ float sum_dropped(const PagedAttentionArgs& a, const Sequence& s, int head, int row,
                             int column) {
  const Cache cache(a.v, head);
  const int position = s.view.position(row);
  return sum_non_finite(s.view.begin(position), s.view.end(position), [&](int key) {
    const char* at =
        cache.data + int64_t{cache.offset(page_of(a, s.pages, key), row_of(a, key))} * 16;
    if (a.v.dtype == DType::E4M3) return float_of_e4m3(load<uint8_t>(at + column));
    return a.v.dtype == DType::I8 ? 0.0f : float_of(load<T>(at + column * 2));
  });
}

// Puts the sum of more keys to that of the keys before: what each is multiplied with.
struct Merge {
  float before, more;
  __device__ __forceinline__ Merge(float& top, float& sum, float more_top, float more_sum) {
    const float highest = fmaxf(top, more_top);
    const float base = highest == kMinusInfinity ? 0.0f : highest;
    before = exp2_approx(top - base), more = exp2_approx(more_top - base);
    sum = fmaf(sum, before, __fmul_rn(more_sum, more));
    top = highest;
  }
  __device__ __forceinline__ float operator()(float x, float y) const {
    return fmaf(x, before, __fmul_rn(y, more));
  }
};

__device__ __forceinline__ float sink_of(const PagedAttentionArgs& a, int head) {
  return a.sinks ? a.sinks[head] * kLog2e : kMinusInfinity;
}

// Block (x, y, z) has a tile of rows, a KV head and every gridDim.z'th split. With partials it
// writes the sum of each split, else it puts them together itself.
template <class S, bool Bytes>
__global__ void __launch_bounds__(S::kThreads, S::kThreads == 32 ? 8 : 2)
    paged_attention_kernel(const __grid_constant__ PagedAttentionArgs a, int max_splits,
                           int64_t n_sums) {
  using T = typename S::T;
  T* const q_tile = dynamic_shared<T>();
  char* const kv_tiles = reinterpret_cast<char*>(q_tile + S::kQueryElements);
  float* const sums = reinterpret_cast<float*>(kv_tiles + Paged<S, Bytes>::kBytes);
  const int kv_head = blockIdx.y, dim = static_cast<int>(a.q.shape[2]);
  const int heads = static_cast<int>(a.q.shape[1]);
  const int group = static_cast<unsigned>(heads) / static_cast<unsigned>(a.k.shape[2]);
  const int first_head = kv_head * group;
  int tile = blockIdx.x;
  const int b = find_sequence(a.cu_seqlens_q, static_cast<int>(a.page_table.shape[0]),
                              static_cast<int>(a.q.shape[0]), group, S::kRows, tile);
  if (b < 0) return;
  const Sequence sequence(a, b, group);
  const View& view = sequence.view;
  const int first_row = ((view.rows + S::kRows - 1) / S::kRows - 1 - tile) * S::kRows;
  const Span seen(view, first_row, first_row + S::kRows - 1);
  const int first = seen.begin / kSplitKeys, last = (seen.end + kSplitKeys - 1) / kSplitKeys;
  if (a.partials && first + static_cast<int>(blockIdx.z) >= last) return;
  const auto rows = [&](const Tensor& t) {
    T* data =
        static_cast<T*>(t.data) + sequence.queries.begin * t.stride[0] + first_head * t.stride[1];
    return RowsOf<T>{data, t.stride[0], t.stride[1], first_row, view.rows, group};
  };
  const auto q_rows = rows(a.q);
  copy_rows<S, S::kRows>(q_tile, q_rows.data, dim, q_rows);
  cp_async_commit();

  const LogitOptions options{a.scale * (a.k_scale ? a.k_scale[kv_head] : 1.0f),
                             a.softcap,
                             a.alibi_slopes,
                             nullptr,
                             {},
                             DType::F32};
  Paged<S, Bytes> source(a, sequence, kv_head, kv_tiles);
  RowState<S> state;
  state.clear();
  float top[2] = {kMinusInfinity, kMinusInfinity}, sum[2] = {};
#pragma unroll 1
  for (int split = first + blockIdx.z; split < last; split += gridDim.z) {
    state.clear();
    const int from = split * kSplitKeys;
    source.look_up(max(from, seen.begin / S::kKeys * S::kKeys));
    attend<S, true>(state, q_tile, source, view, options, first_row, first_head, from,
                    from + kSplitKeys);
    state.close();
    if (a.partials) {
      const bool any_dropped = __syncthreads_or(source.dropped);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first_row + tile_row<S>(0, h);
        if (row >= view.rows) continue;
        const int64_t token = sequence.queries.begin + row / group;
        const int64_t at = (token * heads + first_head + row % group) * max_splits + split;
#pragma unroll
        for (int n = 0; n < S::kDim / 8; ++n)
          store(a.partials + at * S::kDim + n * 8 + lane_id() % 4 * 2,
                Vec<float, 2>{state.o[0][n][2 * h], state.o[0][n][2 * h + 1]});
        if (lane_id() % 4 == 0)
          store(a.partials + n_sums * S::kDim + at * 4,
                Vec<float, 4>{state.top[0][h], state.sum[0][h], any_dropped ? 1.0f : 0.0f, 0.0f});
      }
    } else {
      const Merge low(top[0], sum[0], state.top[0][0], state.sum[0][0]);
      const Merge high(top[1], sum[1], state.top[0][1], state.sum[0][1]);
#pragma unroll
      for (int n = 0; n < S::kDim / 8; ++n) {
        float* const own = sums + (n * S::kThreads + threadIdx.x) * 4;
        Vec<float, 4> x{};
        if (split > first) x = load<Vec<float, 4>>(own);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          x[i] = state.o[0][n][i] = (i < 2 ? low : high)(x[i], state.o[0][n][i]);
        if (split + 1 < last) store(own, x);
      }
    }
  }
  if (a.partials) return;
  const float v_scale = a.v_scale ? a.v_scale[kv_head] : 1.0f;
  write_rows<S>(
      state, source.dropped,
      [&](int, int h) {
        const int row = first_row + tile_row<S>(0, h);
        if (row >= view.rows) return 0.0f;
        return RowEnd(top[h], sum[h], sink_of(a, first_head + row % group)).factor * v_scale;
      },
      q_tile, dim, rows(a.out),
      [&](int r, int column) {
        return sum_dropped<T>(a, sequence, kv_head, first_row + r, column) * v_scale;
      });
}

// A warp puts the sums of a row's splits together.
template <class T, int Dim>
__global__ void __launch_bounds__(128)
    paged_attention_combine(const __grid_constant__ PagedAttentionArgs a, int max_splits,
                            int64_t n_sums) {
  constexpr int kColumns = Dim / 32 < 4 ? 2 : 4;  // that a lane has side by side
  constexpr int kVectors = Dim / 32 / kColumns;
  const int heads = static_cast<int>(a.q.shape[1]), batch = static_cast<int>(a.page_table.shape[0]);
  const int group = static_cast<unsigned>(heads) / static_cast<unsigned>(a.k.shape[2]);
  const int64_t row_index = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  const int64_t tokens = a.q.shape[0];
  if (row_index >= tokens * heads) return;
  const int token = static_cast<int>(row_index / heads), head = static_cast<int>(row_index % heads);
  int b = -1;
  for (int i = lane_id(); i - lane_id() < batch; i += 32) {
    bool own = false;
    if (i < batch) {
      const Piece piece(a.cu_seqlens_q, i, static_cast<int>(tokens));
      own = token >= piece.begin && token < piece.begin + piece.length;
    }
    if (const unsigned owners = __ballot_sync(0xffffffffu, own)) {
      b = i - lane_id() + __ffs(static_cast<int>(owners)) - 1;
      break;
    }
  }
  if (b < 0) return;
  const Sequence sequence(a, b, group);
  const int row = (token - sequence.queries.begin) * group + head % group;
  const int position = sequence.view.position(row);
  const int begin = sequence.view.begin(position), end = sequence.view.end(position);

  float top = kMinusInfinity, sum = 0.0f, o[kVectors][kColumns] = {};
  bool dropped = false;
#pragma unroll 4
  for (int split = begin / kSplitKeys; split * kSplitKeys < end; ++split) {
    const int64_t at = row_index * max_splits + split;
    const auto ends = load<Vec<float, 4>>(a.partials + n_sums * Dim + at * 4);
    const Merge merge(top, sum, ends[0], ends[1]);
    dropped |= ends[2] != 0.0f;
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      const auto more =
          load<Vec<float, kColumns>>(a.partials + at * Dim + (n * 32 + lane_id()) * kColumns);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) o[n][i] = merge(o[n][i], more[i]);
    }
  }
  const int kv_head = head / group;
  const float v_scale = a.v_scale ? a.v_scale[kv_head] : 1.0f;
  const float factor = RowEnd(top, sum, sink_of(a, head)).factor * v_scale;
  T* const out = static_cast<T*>(a.out.data) + token * a.out.stride[0] + head * a.out.stride[1];
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const int column = (n * 32 + lane_id()) * kColumns;
    if (column >= a.q.shape[2]) continue;
    Vec<T, kColumns> y;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      y[i] = round_to<T>(o[n][i] * factor);
      if (dropped)
        y[i] = round_to<T>(float_of(y[i]) +
                           sum_dropped<T>(a, sequence, kv_head, row, column + i) * v_scale);
    }
    store(out + column, y);
  }
}

template <class S, bool Bytes>
Status launch_tiles(const PagedAttentionArgs& a, const PagedAttentionPlan& plan, Stream stream) {
  // In a block by itself a tile keeps the sum of the splits so far in shared memory.
  const bool alone = !a.partials, keeps = alone && plan.splits > 1;
  const size_t bytes = S::kQueryElements * 2 + Paged<S, Bytes>::kBytes +
                       (keeps ? S::kRows * S::kDim * sizeof(float) : 0);
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(a.k.shape[2]),
                  static_cast<unsigned>(alone ? 1 : plan.blocks));
  return launch("paged_attention", paged_attention_kernel<S, Bytes>, grid, dim3(S::kThreads), bytes,
                stream, a, static_cast<int>(plan.splits), plan.n_sums);
}

template <class T, int Dim>
Status launch_dim(const PagedAttentionArgs& a, const PagedAttentionPlan& plan, Stream stream) {
  using Decode = TileShape<T, Dim, 1, 1>;
  using Prefill = TileShape<T, Dim, PagedAttentionPlan::prefill_rows(Dim) / 16, 1>;
  const bool bytes = a.k.dtype == DType::I8 || a.k.dtype == DType::E4M3;
  const Status status = plan.decode ? (bytes ? launch_tiles<Decode, true>(a, plan, stream)
                                             : launch_tiles<Decode, false>(a, plan, stream))
                                    : (bytes ? launch_tiles<Prefill, true>(a, plan, stream)
                                             : launch_tiles<Prefill, false>(a, plan, stream));
  if (status || !a.partials) return status;
  const int64_t rows = a.q.shape[0] * a.q.shape[1];
  return launch("paged_attention_combine", paged_attention_combine<T, Dim>,
                dim3(static_cast<unsigned>((rows + 3) / 4)), dim3(128), 0, stream, a,
                static_cast<int>(plan.splits), plan.n_sums);
}

template <class T>
Status launch_dtype(const PagedAttentionArgs& a, Stream stream) {
  const PagedAttentionPlan plan(a.q.shape[0], a.page_table.shape[0], a.q.shape[1], a.k.shape[2],
                                a.q.shape[2], a.page_table.shape[1] * a.k.shape[1]);
  if (plan.tiles >= 1LL << 31 || a.k.shape[2] > 65535 || a.q.shape[0] * a.q.shape[1] >= 1LL << 31)
    return "paged_attention: expected fewer than 2^31 rows and 2^16 KV heads";
  if (plan.dim == 64) return launch_dim<T, 64>(a, plan, stream);
  if (plan.dim == 128) return launch_dim<T, 128>(a, plan, stream);
  return launch_dim<T, 256>(a, plan, stream);
}

}  // namespace

Status paged_attention(const PagedAttentionArgs& a, Stream stream) {
  return a.q.dtype == DType::F16 ? launch_dtype<f16>(a, stream) : launch_dtype<bf16>(a, stream);
}

}  // namespace pyllm::cuda

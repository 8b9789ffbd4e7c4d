// int8 by int8 with a scale a row of each (W8A8): sums of mma.m16n8k32 in int32, exact, scaled
// once.
//
// As sums are exact, no order of additions has to be kept: tiles are of whatever size suits the
// number of rows, and a row's bits are the same in all of them. The weight is the A operand, so
// that 8 rows of x fill a tile, and lies in memory as it is: its rows are put into shared memory in
// the order in which a lane's results are of consecutive rows of the weight.
//
// The floor: the bytes of the weight, or 2 N K T operations. Predicted for an H100 (3.35 TB/s;
// mma.sync of int8 at 1200 TOP/s, L2 5.5 TB/s), 8192 x 8192 (67 MB), against cuBLAS in fp16; not
// yet run:
//   rows 1 to 64: 20 us at full bandwidth; at 85 %, with launch and fill 26 us: 1.7 x (44 us)
//   rows 128: mma 14 us, L2 134 MB 24 us: 30 us: 1.6 x (47 us)
//   rows 2048: mma 230 us, L2 1.6 GB 290 us: 320 us: 1.2 x (390 us); it is L2 that the next step
//   has to spare, by clusters that share what they read
// What decided: 64 x 64 a warp, as then reading from shared memory (16 ldmatrix for 64 mma) takes
// less time than multiplying; 256 x 128 a block is what 99 KB of shared memory and 255 registers
// carry. A tile that blocks share is added up from memory, not in the registers of the last block,
// which would spill.
//
// Registers: 70 to 8 rows, 94 to 32, 120 at 64, 148 at 128, 232 for the large tiles, none spilled;
// 96 KB of shared memory; one block a multiprocessor.
#include "cuda/dispatch.cuh"
#include "cuda/quant_rows_matmul.h"
#include "cuda/stream_k.cuh"

namespace pyllm::cuda {
namespace {

using Plan = QuantRowsPlan;
constexpr int kThreads = 256;

struct Problem {
  const int8_t *x, *w;
  const float *x_scale, *w_scale, *bias;
  void* y;
  int32_t* partial;
  uint32_t* arrived;
  int64_t x_stride, w_stride, y_stride;  // elements
  int n, k, rows, steps, tiles_rows;
  Ranges ranges;
  DType dtype;  // of y
  bool store_vectors;
};

// Warps stand kWarpsN by kWarpsRows; each has 16 kI rows of the weight by 8 kJ rows of x.
template <int kKind>
struct Config {
  static constexpr QuantRowsTile kTile = Plan::kTile[kKind];
  static constexpr int kWarpsRows = kTile.rows < 64 ? 1 : 2, kWarpsN = 8 / kWarpsRows;
  static constexpr int kI = kTile.n / kWarpsN / 16, kJ = kTile.rows / kWarpsRows / 8;
  static constexpr int kDepth = kTile.depth, kChunks = kDepth / 16;
  static constexpr int kWeightBytes = kTile.n * kDepth;
  static constexpr int kStageBytes = kWeightBytes + kTile.rows * kDepth;
  // At most 98 KB, which every card from sm_80 has.
  static constexpr int kFit = (98 << 10) / kStageBytes;
  static constexpr int kStages = kFit < 6 ? kFit : 6;
  static_assert(kStages >= 3);
};

template <class C>
struct Multiplier {
  static constexpr int kWords = C::kI == 1 ? 2 : 4;  // sums that are moved at once
  static constexpr int kRuns = 2 * C::kI / kWords, kRunStep = 8 * kWords;
  using Sums = Vec<int32_t, kWords>;

  const Problem& p;
  unsigned char* stages;
  int thread, lane, g, t, warp_n, warp_rows;
  int32_t acc[C::kJ][C::kI][4];

  __device__ __forceinline__ Multiplier(const Problem& problem, unsigned char* shared)
      : p(problem),
        stages(shared),
        thread(threadIdx.x),
        lane(thread % 32),
        g(lane / 4),
        t(lane % 4),
        warp_n(thread / 32 % C::kWarpsN),
        warp_rows(thread / 32 / C::kWarpsN) {}

  // Chunks of 16 bytes lie so that eight rows of one column differ in banks.
  __device__ __forceinline__ static int swizzled(int row, int chunk) {
    return row * C::kDepth + (chunk ^ (C::kDepth == 128 ? row % 8 : row / 2 % 4)) * 16;
  }

  // The row of the weight that row `at` of a tile in shared memory is. A lane has results of rows g
  // and g + 8 of fragments; of kWords / 2 fragments these are consecutive rows of the weight.
  __device__ __forceinline__ static int weight_row(int at) {
    return at / kRunStep * kRunStep + at % 8 * kWords + at % kRunStep / 16 * 2 + at / 8 % 2;
  }

  // Begins the copies of one step. What lies outside becomes zero.
  __device__ __forceinline__ void copy(int stage, Place at) const {
    unsigned char* to = stages + stage * C::kStageBytes;
    const int chunk = thread % C::kChunks, k = at.step * C::kDepth + chunk * 16;
    const int n = at.tile / p.tiles_rows * C::kTile.n, row = at.tile % p.tiles_rows * C::kTile.rows;
    constexpr int kAtOnce = kThreads / C::kChunks;
#pragma unroll 1  // what is the same in all steps would take up registers
    for (int i = 0; i < C::kTile.n / kAtOnce; ++i) {
      const int shared_row = thread / C::kChunks + i * kAtOnce, r = n + weight_row(shared_row);
      const bool there = r < p.n && k < p.k;
      cp_async<16>(to + swizzled(shared_row, chunk), there ? p.w + r * p.w_stride + k : p.w,
                   there ? 16 : 0);
    }
    to += C::kWeightBytes;
#pragma unroll 1
    for (int i = 0; i < (C::kTile.rows + kAtOnce - 1) / kAtOnce; ++i) {
      const int shared_row = thread / C::kChunks + i * kAtOnce, r = row + shared_row;
      if (shared_row >= C::kTile.rows) break;
      const bool there = r < p.rows && k < p.k;
      cp_async<16>(to + swizzled(shared_row, chunk), there ? p.x + r * p.x_stride + k : p.x,
                   there ? 16 : 0);
    }
  }

  __device__ __forceinline__ void multiply(int stage) {
    const unsigned char* w = stages + stage * C::kStageBytes;
    const unsigned char* x = w + C::kWeightBytes;
    const int w_row = warp_n * 16 * C::kI + lane % 16, x_row = warp_rows * 8 * C::kJ + lane % 8;
#pragma unroll
    for (int chunk = 0; chunk < C::kChunks; chunk += 4) {
      uint32_t a[2][C::kI][4];
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < C::kI; ++i)
          ldmatrix<4>(a[half][i], w + swizzled(w_row + 16 * i, chunk + 2 * half + lane / 16));
#pragma unroll
      for (int j = 0; j < C::kJ; ++j) {
        uint32_t b[4];
        ldmatrix<4>(b, x + swizzled(x_row + 8 * j, chunk + lane / 8));
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < C::kI; ++i)
            mma_m16n8k32<int8_t, int8_t>(acc[j][i], a[half][i], {b[2 * half], b[2 * half + 1]});
      }
    }
  }

  // In a tile: this lane's first rows of the weight and of x. It has kRuns runs of kWords rows of
  // the weight, kRunStep apart, and rows of x 8 j + e further.
  __device__ __forceinline__ int first_n() const { return warp_n * 16 * C::kI + g * kWords; }
  __device__ __forceinline__ int first_row() const { return warp_rows * C::kJ * 8 + 2 * t; }

  // Calls f(j, e) for each of the lane's rows of x that there are from `row` on. kUnroll: all where
  // f takes sums from registers.
  template <int kUnroll, class F>
  __device__ __forceinline__ void for_rows(int row, F f) const {
    const int left = p.rows - row - first_row();
#pragma unroll kUnroll
    for (int i = 0; i < 2 * C::kJ; ++i) {
      // Beside 128 sums a lane there are no registers to load or compute far ahead.
      if constexpr (C::kI * C::kJ == 32) __syncwarp();
      if (i / 2 * 8 + i % 2 < left) f(i / 2, i % 2);
    }
  }

  // Of row 8 j + e of x and a run.
  __device__ __forceinline__ Sums own_sums(int j, int e, int run) const {
    Sums s;
#pragma unroll
    for (int i = 0; i < kWords; ++i) s[i] = acc[j][run * kWords / 2 + i / 2][i % 2 * 2 + e];
    return s;
  }

  // Adds up what the blocks have and writes the tile.
  __device__ __forceinline__ void finish(int tile) {
    const int first = p.ranges.block_with(tile * p.steps);
    const int last = p.ranges.block_with((tile + 1) * p.steps - 1);
    const int n = tile / p.tiles_rows * C::kTile.n + first_n();
    const int row = tile % p.tiles_rows * C::kTile.rows;
    if (first == last)
      return write<2 * C::kJ>(n, row, [&](int j, int e, int run) { return own_sums(j, e, run); });
    // Every block leaves its part; the last to do so adds up what all have left. The part of the
    // tile that a block has is the first in its range, or else the last.
    const auto part = [&](int block, int j, int e, int run) {
      const int64_t slot = 2 * block + (p.ranges.first_step(block) < tile * p.steps);
      return p.partial + (slot * C::kTile.rows + first_row() + 8 * j + e) * C::kTile.n + first_n() +
             run * kRunStep;
    };
    int32_t* own = part(blockIdx.x, 0, 0, 0);
    for_rows<2 * C::kJ>(row, [&](int j, int e) {
#pragma unroll
      for (int run = 0; run < kRuns; ++run)
        store(own + (8 * j + e) * C::kTile.n + run * kRunStep, own_sums(j, e, run));
    });
    if (!last_to_arrive(p.arrived + tile, last - first)) return;
    write<1>(n, row, [&](int j, int e, int run) {
      Sums sum{};
      for (int block = first; block <= last; ++block) {
        const auto other = load<Sums>(part(block, j, e, run));
#pragma unroll
        for (int i = 0; i < kWords; ++i) sum[i] += other[i];
      }
      return sum;
    });
  }

  // Scales and writes this lane's part of a tile, from there on.
  template <int kUnroll, class F>
  __device__ __forceinline__ void write(int first, int row, F sums_of) const {
    const float* x_scale = p.x_scale + row + first_row();
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int n = first + run * kRunStep;
      float scale[kWords], bias[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        scale[i] = n + i < p.n ? p.w_scale[n + i] : 0.0f;
        bias[i] = n + i < p.n && p.bias ? p.bias[n + i] : 0.0f;
      }
      for_rows<kUnroll>(row, [&](int j, int e) {
        const Sums sums = sums_of(j, e, run);
        const int r = 8 * j + e;
        Vec<float, kWords> y;
#pragma unroll
        for (int i = 0; i < kWords; ++i)
          y[i] = fmaf(static_cast<float>(sums[i]) * scale[i], x_scale[r], bias[i]);
        const int64_t at = (row + first_row() + r) * p.y_stride + n;
        if (p.dtype == DType::F32)
          store_row(static_cast<float*>(p.y) + at, y, p.n - n);
        else if (p.dtype == DType::F16)
          store_row(static_cast<f16*>(p.y) + at, y, p.n - n);
        else
          store_row(static_cast<bf16*>(p.y) + at, y, p.n - n);
      });
    }
  }

  template <class T>
  __device__ __forceinline__ void store_row(T* to, const Vec<float, kWords>& y, int count) const {
    Vec<T, kWords> rounded;
#pragma unroll
    for (int i = 0; i < kWords; ++i) rounded[i] = round_to<T>(y[i]);
    if (p.store_vectors && count >= kWords) {
      store(to, rounded);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        if (i < count) store(to + i, rounded[i]);
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < C::kJ; ++j)
#pragma unroll
      for (int i = 0; i < C::kI; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[j][i][e] = 0;
  }
};

template <class C>
__global__ void __launch_bounds__(kThreads, 1) quant_rows_matmul_kernel(Problem p) {
  Multiplier<C> m(p, dynamic_shared<unsigned char>());
  const int begin = p.ranges.first_step(blockIdx.x), end = p.ranges.first_step(blockIdx.x + 1);
  Place ahead{begin / p.steps, begin % p.steps};
  Place at = ahead;
  int to_copy = end - begin;
  const auto copy_stage = [&](int stage) {
    if (to_copy > 0) {
      m.copy(stage, ahead);
      ahead.advance(p.steps);
      --to_copy;
    }
    cp_async_commit();
  };
  for (int stage = 0; stage < C::kStages - 1; ++stage) copy_stage(stage);
  m.clear();
  for (int left = end - begin, stage = 0; left > 0;
       stage = stage == C::kStages - 1 ? 0 : stage + 1) {
    // The stage to multiply is there, and the one before is done with.
    cp_async_wait<C::kStages - 2>();
    __syncthreads();
    copy_stage(stage == 0 ? C::kStages - 1 : stage - 1);
    m.multiply(stage);
    --left;
    if (at.step == p.steps - 1 || left == 0) {
      m.finish(at.tile);
      m.clear();
    }
    at.advance(p.steps);
  }
}

template <int kKind = 0>
Status launch_kind(const Plan& plan, const Problem& p, Stream stream) {
  if constexpr (kKind + 1 < Plan::kTiles)
    if (plan.kind != kKind) return launch_kind<kKind + 1>(plan, p, stream);
  using C = Config<kKind>;
  return launch("quant_rows_matmul", quant_rows_matmul_kernel<C>,
                dim3(static_cast<unsigned>(plan.blocks)), dim3(kThreads),
                C::kStages * C::kStageBytes, stream, p);
}

}  // namespace

Status quant_rows_matmul(const QuantRowsMatmulArgs& a, Stream stream) {
  Problem p{};
  p.w = a.w.as<const int8_t>(), p.w_scale = a.w_scale.as<const float>();
  p.bias = a.bias.as<const float>();
  p.partial = a.partial.as<int32_t>(), p.arrived = a.arrived.as<uint32_t>();
  p.x_stride = a.x.stride[0], p.w_stride = a.w.stride[0], p.y_stride = a.y.stride[0];
  p.n = static_cast<int>(a.w.shape[0]), p.k = static_cast<int>(a.w.shape[1]);
  p.dtype = a.y.dtype;
  p.store_vectors = aligned<4>(a.y);
  const int64_t most = Plan::most_rows(p.n);
  for (int64_t row = 0; row < a.x.shape[0]; row += most) {
    p.rows = static_cast<int>(std::min(a.x.shape[0] - row, most));
    p.x = a.x.as<const int8_t>() + row * p.x_stride;
    p.x_scale = a.x_scale.as<const float>() + row;
    p.y = a.y.as<uint8_t>() + row * p.y_stride * item_size(p.dtype);
    const Plan plan = Plan::of(p.rows, p.n, p.k, a.multiprocessors);
    p.steps = static_cast<int>(plan.steps), p.tiles_rows = static_cast<int>(plan.tiles_rows);
    p.ranges = Ranges::of(plan.tiles_n * plan.tiles_rows * plan.steps, plan.blocks, 0);
    if (const Status status = launch_kind(plan, p, stream)) return status;
  }
  return nullptr;
}

}  // namespace pyllm::cuda

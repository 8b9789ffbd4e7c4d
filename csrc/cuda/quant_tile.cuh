// What a block does for one step of quant_matmul: copy, sum, multiply; and for a finished tile: add
// up, write. See quant_matmul.cu.
#pragma once
#include "cuda/dequantize.cuh"
#include "cuda/quant_matmul.h"
#include "cuda/stream_k.cuh"

namespace pyllm::cuda {
namespace {

using Plan = QuantMatmulPlan;
constexpr int kThreads = 256;
constexpr int kStrips = Plan::kTileRows / QuantFragments::kRows;

struct Problem {
  const uint8_t *x, *weight;
  const float* bias;
  uint8_t* y;
  Vec<float, 4>* partial;
  uint32_t* arrived;
  int64_t x_stride;  // bytes
  int64_t y_stride;  // elements
  int n, k, strips, cells, spans, steps, rows;
  Ranges ranges;
  int share;  // of a span there are 2^share cells
  bool store_vectors;
  bool wide;  // y is float32
};

template <class T_, int kBits_, int kGroup_, bool kMinimum_, int kTiles_>
struct Config {
  using T = T_;
  static constexpr int kBits = kBits_, kGroup = kGroup_;
  static constexpr bool kMinimum = kMinimum_;
  static constexpr int kTiles = kTiles_;  // of 8 rows of x
  static constexpr int kRows = 8 * kTiles;
  static constexpr int kOffset = kMinimum ? 0 : 1 << (kBits - 1);
  static constexpr int kGroups = 32 / kGroup;       // of a cell; of 32 is also what is larger
  static constexpr int kScales = kMinimum ? 8 : 4;  // of a lane and group
  static constexpr int kQuantBytes = 128 * kBits;   // of a cell
  static constexpr int kScaleBytes = 16 * kGroups * kScales;  // of a span
  static constexpr int kCellBytes = kQuantBytes + kScaleBytes;
  // Shared memory: stages of kSteps steps, and beside them sums of x and what halves exchange. At
  // most 99 KB in all, which every card from sm_80 has.
  static constexpr int kSteps = kTiles <= 4 ? 2 : 1;
  static constexpr int kWeightBytes = 8 * kCellBytes, kXBytes = kRows * 128;  // of a step
  static constexpr int kStageBytes = kSteps * (kWeightBytes + kXBytes);
  static constexpr int kFit = (86 << 10) / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static_assert(kStages >= 3);
  static constexpr int kSums = kMinimum ? kSteps * 2 * kGroups * kRows : 0;  // floats of a stage
  static constexpr int kSharedBytes = kStages * kStageBytes + 8 * kThreads * 4 + 2 * kSums * 4;
  // After the halves have exchanged what they add up.
  static constexpr int kOwnTiles = kTiles > 1 ? kTiles / 2 : 1;
};

template <class C>
struct Multiplier {
  using T = typename C::T;
  const Problem& p;
  unsigned char* stages;
  Vec<float, 4>* exchange;
  float* sums;
  int thread, warp, lane, g, t, half, strip;  // the strip of the tile
  float acc[C::kTiles][2][4];

  __device__ __forceinline__ Multiplier(const Problem& problem, unsigned char* shared)
      : p(problem),
        stages(shared),
        exchange(reinterpret_cast<Vec<float, 4>*>(shared + C::kStages * C::kStageBytes)),
        sums(reinterpret_cast<float*>(exchange + 2 * kThreads)),
        thread(threadIdx.x),
        warp(thread / 32),
        lane(thread % 32),
        g(lane / 4),
        t(lane % 4),
        half(warp / kStrips),
        strip(warp % kStrips) {}

  __device__ __forceinline__ unsigned char* weights(int stage, int step) const {
    return stages + (stage * C::kSteps + step) * (C::kWeightBytes + C::kXBytes);
  }
  // Of this warp's cell. Cells of a span that are in one stage use those beside the first.
  __device__ __forceinline__ unsigned char* scales(int stage, int step) const {
    return weights(stage, p.share == 2 ? 0 : step) + (p.share ? strip : warp) * C::kCellBytes +
           C::kQuantBytes;
  }
  __device__ __forceinline__ unsigned char* activations(int stage, int step) const {
    return weights(stage, step) + C::kWeightBytes;
  }
  // Rows of 128 bytes, whose 16-byte chunks lie so that eight rows of one column differ in banks.
  __device__ __forceinline__ static int swizzled(int row, int chunk) {
    return row * 128 + (chunk ^ row % 8) * 16;
  }
  __device__ __forceinline__ bool has_cell(Place at) const {
    return at.tile * kStrips + strip < p.strips && 2 * at.step + half < p.cells;
  }

  // Begins the copies of one step.
  __device__ __forceinline__ void copy(int stage, int step, Place at) const {
    if (has_cell(at)) {
      const int cell = 2 * at.step + half, within = cell & ((1 << p.share) - 1);
      const int64_t span = int64_t{at.tile * kStrips + strip} * p.spans + (cell >> p.share);
      const int quants = C::kQuantBytes << p.share;
      const uint8_t* from = p.weight + span * (quants + C::kScaleBytes) + lane * 16;
      unsigned char* to = weights(stage, step) + warp * C::kCellBytes + lane * 16;
#pragma unroll
      for (int v = 0; v < C::kBits / 4; ++v)
        cp_async<16>(to + v * 512, from + within * C::kQuantBytes + v * 512);
      to += C::kQuantBytes;
      if (lane < C::kScaleBytes / 16 && to == scales(stage, step) + lane * 16)
        cp_async<16>(to, from + quants);
    }
    unsigned char* x = activations(stage, step) + swizzled(thread / 8, thread % 8);
    const int k = at.step * Plan::kStepDepth + thread % 8 * 8;
    const uint8_t* from = p.x + thread / 8 * p.x_stride + (k < p.k ? int64_t{k} * 2 : 0);
#pragma unroll 1  // what is the same in all steps would take up registers
    for (int row = thread / 8; row < p.rows; row += kThreads / 8) {
      cp_async<16>(x, from, k < p.k ? 16 : 0);
      x += kThreads / 8 * 128, from += kThreads / 8 * p.x_stride;
    }
  }

  // Where this lane reads a cell's x for `ldmatrix`: rows 8 i to 8 i + 7, four times 8 k, lie
  // 1024 i bytes further.
  __device__ __forceinline__ const unsigned char* x_of(int stage, int step, int cell) const {
    return activations(stage, step) + swizzled(lane % 8, 4 * cell + lane / 8);
  }

  // This warp's share of the sums of x over the groups of a stage. [step][cell][group][row]
  __device__ __forceinline__ void sum_groups(int stage, float* to) const {
    constexpr uint32_t kOne = std::is_same_v<T, f16> ? 0x3c003c00 : 0x3f803f80;
    const uint32_t ones[4] = {kOne, kOne, kOne, kOne};
    const float zero[4] = {};
#pragma unroll 1
    for (int item = warp; item < C::kSteps * 2 * C::kTiles; item += 8) {
      const int tile = item % C::kTiles, cell = item / C::kTiles % 2, step = item / C::kTiles / 2;
      uint32_t b[4];
      ldmatrix<4>(b, x_of(stage, step, cell) + 1024 * tile);
      float sum[2][4];
      mma_m16n8k16<T>(sum[0], ones, {b[0], b[1]}, zero);
      if constexpr (C::kGroups == 1)
        mma_m16n8k16<T>(sum[0], ones, {b[2], b[3]});
      else
        mma_m16n8k16<T>(sum[1], ones, {b[2], b[3]}, zero);
      // All rows of the product are the same.
      if (g == 0)
#pragma unroll
        for (int group = 0; group < C::kGroups; ++group)
          store(to + ((step * 2 + cell) * C::kGroups + group) * C::kRows + 8 * tile + 2 * t,
                Vec<float, 2>{sum[group][0], sum[group][1]});
    }
  }

  // Adds this warp's cell of a step. sums: of the step's cell.
  __device__ __forceinline__ void multiply(int stage, int step, const float* sums_of_cell) {
    const unsigned char* cell = weights(stage, step) + warp * C::kCellBytes;
    uint32_t a[2][2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (C::kBits == 4) {
        if (i > 0) continue;
        const auto q = load<Vec<uint32_t, 4>>(cell + lane * 16);
#pragma unroll
        for (int f = 0; f < 4; ++f) dequantize<T, C::kOffset>(a[f / 2][f % 2], q[f]);
      } else {
        const auto q = load<Vec<uint32_t, 4>>(cell + i * 512 + lane * 16);
#pragma unroll
        for (int j = 0; j < 2; ++j) dequantize<T, C::kOffset>(a[i][j], q[2 * j], q[2 * j + 1]);
      }
    }
    float d[C::kGroups][C::kScales];
#pragma unroll
    for (int group = 0; group < C::kGroups; ++group) {
      const auto loaded = load<Vec<f16, C::kScales>>(scales(stage, step) +
                                                     (g * C::kGroups + group) * C::kScales * 2);
#pragma unroll
      for (int i = 0; i < C::kScales; ++i) d[group][i] = float_of(loaded[i]);
    }
    const unsigned char* x = x_of(stage, step, half);
    const float zero[4] = {};
#pragma unroll
    for (int tile = 0; tile < C::kTiles; ++tile) {
      // Of 128 sums a lane, there are no registers to load far ahead.
      if (C::kTiles == 16 && tile % 4 == 0) __syncwarp();
      uint32_t b[4];
      ldmatrix<4>(b, x + 1024 * tile);
#pragma unroll
      for (int group = 0; group < C::kGroups; ++group) {
        Vec<float, 2> s{};
        if constexpr (C::kMinimum)
          s = load<Vec<float, 2>>(sums_of_cell + group * C::kRows + 8 * tile + 2 * t);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float part[4];
          mma_m16n8k16<T>(part, a[i][group], {b[2 * group], b[2 * group + 1]}, zero);
          if constexpr (C::kGroups == 1) mma_m16n8k16<T>(part, a[i][1], {b[2], b[3]});
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& sum = acc[tile][i][e];
            sum = fmaf(d[group][2 * i + e / 2], part[e], sum);
            if constexpr (C::kMinimum) sum = fmaf(d[group][4 + 2 * i + e / 2], s[e % 2], sum);
          }
        }
      }
    }
  }

  // The row of x of out[tile][e] of `finish`.
  __device__ __forceinline__ int row_of(int tile, int e) const {
    return 8 * (tile + (C::kTiles > 1 ? half * C::kOwnTiles : 0)) + 2 * t + e;
  }

  // Adds up what the two halves have, then what the blocks have, and writes the tile.
  __device__ __forceinline__ void finish(int tile) {
    Vec<float, 4> out[C::kOwnTiles][2];  // of two rows of x, four of the weight
#pragma unroll
    for (int j = 0; j < C::kOwnTiles; ++j) {
      Vec<float, 4> sent[2];
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float first = acc[j][i / 2][i % 2 * 2 + e];
          const float second = acc[C::kTiles > 1 ? j + C::kOwnTiles : j][i / 2][i % 2 * 2 + e];
          out[j][e][i] = half ? second : first;
          sent[e][i] = half ? first : second;
        }
      store(exchange + thread, sent[0]);
      store(exchange + kThreads + thread, sent[1]);
      __syncthreads();
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const auto other = load<Vec<float, 4>>(exchange + e * kThreads + (thread ^ 128));
#pragma unroll
        for (int i = 0; i < 4; ++i) out[j][e][i] += other[i];
      }
      __syncthreads();
    }
    const int first = p.ranges.block_with(tile * p.steps);
    const int last = p.ranges.block_with((tile + 1) * p.steps - 1);
    if (first == last || add_blocks(out, tile, first, last)) write(out, tile);
  }

  // Leaves this block's part; the last to do so adds all up, in order, and returns true.
  __device__ __forceinline__ bool add_blocks(Vec<float, 4> (&out)[C::kOwnTiles][2], int tile,
                                             int first, int last) {
    const bool idle = C::kTiles == 1 && half == 1;  // the other half has it all
    // The part of the tile that a block has is the first in its range, or else the last.
    const auto at = [&](int block, int row) {
      const int64_t slot = 2 * block + (p.ranges.first_step(block) < tile * p.steps);
      return p.partial + (slot * C::kRows + row) * (Plan::kTileRows / 4) + strip * 8 + g;
    };
#pragma unroll
    for (int j = 0; j < C::kOwnTiles; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (!idle && row_of(j, e) < p.rows) store(at(blockIdx.x, row_of(j, e)), out[j][e]);
    if (!last_to_arrive(p.arrived + tile, last - first)) return false;
    for (int block = first; block <= last; ++block)
#pragma unroll
      for (int j = 0; j < C::kOwnTiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (!idle && row_of(j, e) < p.rows) {
            const auto part = load<Vec<float, 4>>(at(block, row_of(j, e)));
#pragma unroll
            for (int i = 0; i < 4; ++i)
              out[j][e][i] = block == first ? part[i] : out[j][e][i] + part[i];
          }
    return true;
  }

  __device__ __forceinline__ void write(const Vec<float, 4> (&out)[C::kOwnTiles][2],
                                        int tile) const {
    if (C::kTiles == 1 && half == 1) return;
    const int first = tile * Plan::kTileRows + strip * 32 + 4 * g;
    const int count = min(p.n - first, 4);
    float bias[4] = {};
    if (p.bias)
      for (int i = 0; i < 4; ++i)
        if (i < count) bias[i] = p.bias[first + i];
#pragma unroll
    for (int j = 0; j < C::kOwnTiles; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = row_of(j, e);
        if (row >= p.rows) continue;
        const int64_t at = row * p.y_stride + first;
        Vec<float, 4> y;
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i] = out[j][e][i] + bias[i];
        if (p.wide)
          store_row(reinterpret_cast<float*>(p.y) + at, y, count);
        else
          store_row(reinterpret_cast<T*>(p.y) + at, y, count);
      }
  }

  template <class Y>
  __device__ __forceinline__ void store_row(Y* to, const Vec<float, 4>& y, int count) const {
    Vec<Y, 4> rounded;
#pragma unroll
    for (int i = 0; i < 4; ++i) rounded[i] = round_to<Y>(y[i]);
    if (p.store_vectors && count == 4) {
      store(to, rounded);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < count) store(to + i, rounded[i]);
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int tile = 0; tile < C::kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[tile][i][e] = 0.0f;
  }
};

}  // namespace
}  // namespace pyllm::cuda

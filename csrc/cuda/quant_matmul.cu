// Multiplication by weights of 4 and 8 bits.
//
// One kernel serves one row of activations and 128: the weights go through registers to the tensor
// cores as q - offset, exactly, and scale and minimum are applied to the float sums of a group, the
// minimum times the group's sum of x (which the tensor cores form too, by a matrix of ones).
// Neither weights nor activations are rounded. The weight is the A operand, so that 8 rows of x
// fill a tile; each of its bytes is copied once to shared memory, by the lane that dequantizes it.
//
// The order of additions of an output is fixed by N, K and the number of multiprocessors: groups
// alternate between two halves of the block, each in order of k; then the halves; then the blocks
// that shared the tile (stream-K), in order, added by whichever comes last. It does not depend on
// the rows of x, so a row's bits are the same alone, in a batch, and on either side of every change
// of tile size.
//
// The floor: the bytes of the weight (4 bits: 4.5 a weight, 5 with a minimum), or 2 N K T
// operations. Predicted for an H100 (3.35 TB/s; mma.sync at 600 TFLOP/s), 4 bits with a minimum,
// 8192 x 8192, against cuBLAS in fp16 (134 MB: 44 us up to 64 rows, 47 us at 128); not yet run:
//   rows 1: 42 MB, 12.5 us at full bandwidth; at 85 %, with launch, fill and fix-up 17 us: 2.5 x
//   rows 16: as bytes; x from L2 17 MB: 18 us: 2.4 x
//   rows 64: mma 16 us, L2 120 MB: 24 us: 1.8 x
//   rows 128: mma 32 us with the sums, L2 200 MB 36 us: 41 us: 1.1 x
// What decided: tiles of 128 rows of the weight keep the reading of x (N / 128 times) below L2's
// bandwidth; two halves of 32 x 128 a warp, not 8 warps of 16 rows, halve the reading of x from
// shared memory; one block a multiprocessor cuts tiles least. Sums of x by every warp would be half
// again as many mma; each takes a share, one stage ahead, so that no barrier is added.
// For one row seven columns of eight are wasted, and yet the tensor cores are far from their limit,
// where products on the ordinary lanes would set it from 4 rows on.
//
// Groups of 64 and 128 are formats of groups of 32 here, whose scales lie in memory once: 4.25 bits
// a weight in groups of 128 with a minimum instead of 5 (36 MB of the example: 15 us for one row).
//
// Registers: about 70 to 8 rows, 145 to 32, 230 at 64, 255 at 128, none spilled; up to 99 KB of
// shared memory, of which 40 KB and more are copies in flight; one block a multiprocessor.
#include "cuda/dispatch.cuh"
#include "cuda/quant_matmul.h"
#include "cuda/quant_tile.cuh"

namespace pyllm::cuda {
namespace {

template <class C>
__global__ void __launch_bounds__(kThreads, 1) quant_matmul_kernel(Problem p) {
  Multiplier<C> m(p, dynamic_shared<unsigned char>());
  const int begin = p.ranges.first_step(blockIdx.x), end = p.ranges.first_step(blockIdx.x + 1);
  Place ahead{begin / p.steps, begin % p.steps};
  Place at = ahead;
  int to_copy = end - begin, left = to_copy;
  const auto copy_stage = [&](int stage) {
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step)
      if (to_copy > 0) {
        m.copy(stage, step, ahead);
        ahead.advance(p.steps);
        --to_copy;
      }
    cp_async_commit();
  };
  for (int stage = 0; stage < C::kStages - 1; ++stage) copy_stage(stage);
  if constexpr (C::kMinimum) {
    cp_async_wait<C::kStages - 2>();
    __syncthreads();
    m.sum_groups(0, m.sums);
  }
  m.clear();
  for (int stage = 0, parity = 0; left > 0; parity ^= 1) {
    // The stage to multiply is there, for sums also the next; and the one before is done with.
    cp_async_wait<C::kStages - (C::kMinimum ? 3 : 2)>();
    __syncthreads();
    copy_stage(stage == 0 ? C::kStages - 1 : stage - 1);
    const int next = stage == C::kStages - 1 ? 0 : stage + 1;
    if constexpr (C::kMinimum)
      if (left > C::kSteps) m.sum_groups(next, m.sums + (parity ^ 1) * C::kSums);
#pragma unroll 1
    for (int step = 0; step < C::kSteps && left > 0; ++step) {
      const int cell = step * 2 + m.half;
      if (m.has_cell(at))
        m.multiply(stage, step, m.sums + parity * C::kSums + cell * C::kGroups * C::kRows);
      --left;
      if (at.step == p.steps - 1 || left == 0) {
        m.finish(at.tile);
        m.clear();
      }
      at.advance(p.steps);
    }
    stage = next;
  }
}

template <class C>
Status launch_rows(const Problem& problem, int blocks, Stream stream) {
  return launch("quant_matmul", quant_matmul_kernel<C>, dim3(static_cast<unsigned>(blocks)),
                dim3(kThreads), C::kSharedBytes, stream, problem);
}

template <class T, int kBits, int kGroup, bool kMinimum>
Status launch_format(const QuantFragments& f, const Problem& p, int blocks, Stream stream) {
  const int rows = Plan::padded_rows(p.rows, f);
  if (rows == 8) return launch_rows<Config<T, kBits, kGroup, kMinimum, 1>>(p, blocks, stream);
  if constexpr (kGroup == 32) {
    if (rows == 16) return launch_rows<Config<T, kBits, kGroup, kMinimum, 2>>(p, blocks, stream);
    if (rows == 32) return launch_rows<Config<T, kBits, kGroup, kMinimum, 4>>(p, blocks, stream);
    if (rows == 128) return launch_rows<Config<T, kBits, kGroup, kMinimum, 16>>(p, blocks, stream);
  }
  return launch_rows<Config<T, kBits, kGroup, kMinimum, 8>>(p, blocks, stream);
}

template <class T>
Status launch_type(const QuantFragments& f, const Problem& p, int blocks, Stream stream) {
  const auto with_group = [&]<int kBits, int kGroup>() {
    return f.has_minimum ? launch_format<T, kBits, kGroup, true>(f, p, blocks, stream)
                         : launch_format<T, kBits, kGroup, false>(f, p, blocks, stream);
  };
  if (f.bits == 4)
    return f.span_groups() == 1 ? with_group.template operator()<4, 32>()
                                : with_group.template operator()<4, 16>();
  return f.span_groups() == 1 ? with_group.template operator()<8, 32>()
                              : with_group.template operator()<8, 16>();
}

}  // namespace

Status quant_matmul(const QuantMatmulArgs& a, Stream stream) {
  const QuantFragments& f = a.format;
  Problem p{};
  p.weight = a.weight;
  p.bias = a.bias.as<const float>();
  p.partial = a.partial.as<Vec<float, 4>>();
  p.arrived = a.arrived.as<uint32_t>();
  p.x_stride = a.x.stride[0] * 2, p.y_stride = a.y.stride[0];
  p.strips = static_cast<int>(f.strips()), p.spans = static_cast<int>(f.spans());
  p.cells = static_cast<int>((f.k + f.kDepth - 1) / f.kDepth);
  p.share = f.span_cells() / 2;
  p.n = static_cast<int>(f.n), p.k = static_cast<int>(f.k);
  p.steps = static_cast<int>(a.plan.steps);
  p.ranges = Ranges::of(a.plan.tiles * a.plan.steps, a.plan.blocks, p.share / 2);
  p.store_vectors = aligned<4>(a.y), p.wide = a.y.dtype == DType::F32;
  const int most = Plan::most_rows(f);
  for (int64_t row = 0; row < a.x.shape[0]; row += most) {
    p.rows = static_cast<int>(std::min<int64_t>(a.x.shape[0] - row, most));
    p.x = a.x.as<const uint8_t>() + row * p.x_stride;
    p.y = a.y.as<uint8_t>() + row * p.y_stride * item_size(a.y.dtype);
    const Status status = a.x.dtype == DType::F16 ? launch_type<f16>(f, p, a.plan.blocks, stream)
                                                  : launch_type<bf16>(f, p, a.plan.blocks, stream);
    if (status) return status;
  }
  return nullptr;
}

}  // namespace pyllm::cuda

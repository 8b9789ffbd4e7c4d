// Reductions in a fixed order.
#pragma once
#include "cuda/primitives.cuh"

namespace pyllm::cuda {

struct Sum {
  static constexpr float kNone = 0.0f;
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
// Of values that are not negative. NaN is the largest of all, then infinity.
struct Max {
  static constexpr float kNone = 0.0f;
  __device__ __forceinline__ float operator()(float a, float b) const {
    const uint32_t x = __float_as_uint(a), y = __float_as_uint(b);
    return __uint_as_float(x > y ? x : y);
  }
};

// Over the threads that have the same threadIdx.y, M values at once; the result is in all of them.
// blockDim.x is a power of two up to 32, or a multiple of 32; the block has whole warps, and all of
// its threads come. `turn` starts at 0 and is the kernel's for all of its reductions: two buffers
// take turns, since a warp may begin the next reduction while another still reads this one.
template <int M, class F>
__device__ __forceinline__ void row_reduce(float (&x)[M], F combine, int& turn) {
  __shared__ float partial[2][M][32];
  const int width = blockDim.x;
  for (int distance = width < 32 ? width / 2 : 16; distance > 0; distance /= 2)
#pragma unroll
    for (int m = 0; m < M; ++m) x[m] = combine(x[m], __shfl_xor_sync(0xffffffffu, x[m], distance));
  if (width <= 32) return;
  const int warps = width / 32, lane = threadIdx.x % 32, first = threadIdx.y * warps;
  if (lane == 0)
#pragma unroll
    for (int m = 0; m < M; ++m) partial[turn][m][first + threadIdx.x / 32] = x[m];
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M; ++m) x[m] = lane < warps ? partial[turn][m][first + lane] : F::kNone;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
#pragma unroll
    for (int m = 0; m < M; ++m) x[m] = combine(x[m], __shfl_xor_sync(0xffffffffu, x[m], distance));
  turn ^= 1;
}

}  // namespace pyllm::cuda

// Reductions over a warp and over a block, in a fixed order.
#pragma once
#include "cuda/primitives.cuh"

namespace pyllm::cuda {

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// The same in every thread. The block has whole warps; once in a kernel, or after a barrier.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float partial[32];
  x = warp_sum(x);
  if (blockDim.x <= 32) return x;
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}

}  // namespace pyllm::cuda

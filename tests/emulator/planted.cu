// One bug of each kind, in the line that says so. tests/test_emulator.py sees each of them found.
#include "cuda/primitives.cuh"

using namespace pyllm::cuda;

__global__ void correct(const float* x, float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void missing_barrier(const float* x, float* y) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[63 - threadIdx.x];  // BUG
}

// The reads of one round and the writes of the next.
__global__ void missing_second_barrier(const float* x, float* y) {
  __shared__ float tile[64];
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = x[threadIdx.x];  // BUG
    __syncthreads();
    y[threadIdx.x] = tile[63 - threadIdx.x];
  }
}

// Lanes of a warp run in no order either.
__global__ void missing_syncwarp(const float* x, float* y) {
  __shared__ float tile[32];
  tile[threadIdx.x] = x[threadIdx.x];
#ifdef FIXED
  __syncwarp();
#endif
  y[threadIdx.x] = tile[threadIdx.x ^ 1];  // BUG
}

// Two copies are in flight; the first is used when only the one before it has been waited for.
__global__ void wrong_group_count(const float* x, float* y) {
  __shared__ __align__(16) float tile[2][128];
  cp_async<16>(&tile[0][threadIdx.x * 4], x + threadIdx.x * 4);
  cp_async_commit();
  cp_async<16>(&tile[1][threadIdx.x * 4], x + threadIdx.x * 4);
  cp_async_commit();
  cp_async_wait<2>();
  __syncthreads();
  y[threadIdx.x] = tile[0][threadIdx.x];  // BUG
}

// Waited for, but by each thread for its own copies only.
__global__ void copy_without_barrier(const float* x, float* y) {
  __shared__ __align__(16) float tile[128];
  cp_async<16>(&tile[threadIdx.x * 4], x + threadIdx.x * 4);
  cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = tile[threadIdx.x];  // BUG
}

__global__ void out_of_bounds_global(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x + 1];  // BUG
}

__global__ void out_of_bounds_shared(const float* x, float* y) {
  float* tile = dynamic_shared<float>();
  tile[threadIdx.x + 1] = x[threadIdx.x];  // BUG
  y[threadIdx.x] = 0;
}

__global__ void wild_pointer(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x * 1000000000ll];  // BUG
}

__global__ void null_pointer(const float* x, float* y) {
  const float* none = x == y ? x : nullptr;
  y[threadIdx.x] = none[threadIdx.x];  // BUG
}

__global__ void inactive_lane(const float* x, float* y) {
  float value = x[threadIdx.x];
  if (threadIdx.x < 16) value += __shfl_down_sync(0xffffffffu, value, 8);  // BUG
  y[threadIdx.x] = value;
}

__global__ void shuffle_outside_of_mask(const float* x, float* y) {
  float value = x[threadIdx.x];
  if (threadIdx.x < 16) value += __shfl_xor_sync(0x0000ffffu, value, 16);  // BUG
  y[threadIdx.x] = value;
}

__global__ void different_masks(const float* x, float* y) {
  float value = x[threadIdx.x];
  const unsigned mask = threadIdx.x < 16 ? 0xffffffffu : 0xffff8000u;
  y[threadIdx.x] = __shfl_sync(mask, value, 31);  // BUG
}

__global__ void misaligned(const float* x, float* y) {
  const auto v = load<Vec<float, 4>>(x + threadIdx.x * 4 + 1);  // BUG
  y[threadIdx.x] = v[0];
}

__global__ void misaligned_struct(const float* x, float* y) {
  const auto* v = reinterpret_cast<const Vec<float, 2>*>(x + threadIdx.x + 1);
  Vec<float, 2> pair;
  memcpy(&pair, v, 8);  // BUG
  y[threadIdx.x] = pair[1];
}

__global__ void divergent_barrier(const float* x, float* y) {
  if (threadIdx.x < 16) __syncthreads();  // BUG
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void two_barriers(const float* x, float* y) {
  if (threadIdx.x < 16) {
    __syncthreads();  // BUG
    y[threadIdx.x] = x[threadIdx.x];
  } else {
    __syncthreads();  // BUG
  }
}

// One warp waits for a partner that waits elsewhere.
__global__ void deadlock(const float* x, float* y) {
  const int warp = threadIdx.x / 32;
  barrier_sync(1 + warp, 64);  // BUG
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void endless_wait(const float* x, float* y) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) mbarrier_init(&barrier, 2);
  __syncthreads();
  if (threadIdx.x == 0) mbarrier_arrive(&barrier);
  mbarrier_wait(&barrier, 0);  // BUG
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void unwritten_shared(const float* x, float* y) {
  __shared__ float tile[64];
  if (threadIdx.x < 32) tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}

// Each primitive on its own, for tests/test_emulator.py to compare with the formula.
#include "cuda/primitives.cuh"

using namespace pyllm;
using namespace pyllm::cuda;

// c = a b: a [16, 16] row by row, b [16, 8] stored as its transpose, through ldmatrix.
template <class T>
__global__ void mma16(const uint16_t* a, const uint16_t* b, float* c) {
  __shared__ __align__(16) uint16_t sa[16][16], sb[8][16];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) sa[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) sb[i / 16][i % 16] = b[i];
  __syncwarp();
  uint32_t fa[4], fb[2];
  ldmatrix<4>(fa, &sa[lane % 16][lane / 16 * 8]);
  ldmatrix<2>(fb, &sb[lane % 8][lane / 8 % 2 * 8]);
  float d[4] = {};
  mma_m16n8k16<T>(d, fa, fb);
  const int g = lane / 4, t = lane % 4 * 2;
  c[g * 8 + t] = d[0], c[g * 8 + t + 1] = d[1];
  c[(g + 8) * 8 + t] = d[2], c[(g + 8) * 8 + t + 1] = d[3];
}

// The same with b [16, 8] row by row, loaded with .trans.
__global__ void mma16_transposed(const uint16_t* a, const uint16_t* b, float* c) {
  __shared__ __align__(16) uint16_t sa[16][16], sb[16][8];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) sa[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) sb[i / 8][i % 8] = b[i];
  __syncwarp();
  uint32_t fa[4], fb[2];
  ldmatrix<4>(fa, &sa[lane % 16][lane / 16 * 8]);
  ldmatrix<2, true>(fb, &sb[lane % 16][0]);
  float d[4] = {};
  mma_m16n8k16<f16>(d, fa, fb);
  const int g = lane / 4, t = lane % 4 * 2;
  c[g * 8 + t] = d[0], c[g * 8 + t + 1] = d[1];
  c[(g + 8) * 8 + t] = d[2], c[(g + 8) * 8 + t + 1] = d[3];
}

// c = a b: a [16, 32], b [32, 8] stored as its transpose, bytes.
template <class A, class B>
__global__ void mma32(const uint8_t* a, const uint8_t* b, int* c) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) fa[i] = load<uint32_t>(a + (g + i % 2 * 8) * 32 + 4 * t + i / 2 * 16);
  for (int i = 0; i < 2; ++i) fb[i] = load<uint32_t>(b + g * 32 + 4 * t + i * 16);
  int d[4] = {};
  mma_m16n8k32<A, B>(d, fa, fb);
  c[g * 8 + 2 * t] = d[0], c[g * 8 + 2 * t + 1] = d[1];
  c[(g + 8) * 8 + 2 * t] = d[2], c[(g + 8) * 8 + 2 * t + 1] = d[3];
}

__global__ void warp_functions(const int* x, int* y) {
  const int lane = threadIdx.x, v = x[lane];
  const unsigned all = 0xffffffffu;
  int predicate;
  y[0 * 32 + lane] = __shfl_sync(all, v, 5);
  y[1 * 32 + lane] = __shfl_up_sync(all, v, 3);
  y[2 * 32 + lane] = __shfl_down_sync(all, v, 3, 8);
  y[3 * 32 + lane] = __shfl_xor_sync(all, v, 9);
  y[4 * 32 + lane] = static_cast<int>(__ballot_sync(all, v > 0));
  y[5 * 32 + lane] = __any_sync(all, v == x[7]) + 2 * __all_sync(all, v > 0);
  y[6 * 32 + lane] = static_cast<int>(__match_any_sync(all, v & 3));
  y[7 * 32 + lane] = static_cast<int>(__match_all_sync(all, 1, &predicate)) + predicate;
  y[8 * 32 + lane] = static_cast<int>(__reduce_add_sync(all, static_cast<unsigned>(v)));
  y[9 * 32 + lane] = __reduce_min_sync(all, v);
}

__global__ void block_functions(const int* x, int* y) {
  const int v = x[threadIdx.x];
  const int count = __syncthreads_count(v > 0), all = __syncthreads_and(v > -100),
            any = __syncthreads_or(v > 1000);
  y[threadIdx.x] = count * 4 + all * 2 + any;
}

__global__ void histogram(const int* x, int n, int* counts, int* largest) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    atomicAdd(counts + (x[i] & 7), 1);
    atomicMax(largest, x[i]);
  }
}

// A producer warp copies tiles, a consumer warp reads them: full and empty barriers by phase.
__global__ void pipeline(const float* x, float* y, int tiles) {
  __shared__ __align__(16) float tile[2][128];
  __shared__ uint64_t full[2], empty[2];
  if (threadIdx.x == 0)
    for (int s = 0; s < 2; ++s) mbarrier_init(full + s, 32), mbarrier_init(empty + s, 32);
  __syncthreads();
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    for (int i = 0; i < tiles; ++i) {
      const int s = i % 2;
      if (i >= 2) mbarrier_wait(empty + s, (i / 2 - 1) % 2);
      cp_async<16>(&tile[s][lane * 4], x + i * 128 + lane * 4);
      cp_async_mbarrier_arrive(full + s);
    }
  } else {
    for (int i = 0; i < tiles; ++i) {
      const int s = i % 2;
      mbarrier_wait(full + s, i / 2 % 2);
      for (int j = 0; j < 4; ++j) y[i * 128 + lane + 32 * j] = tile[s][127 - lane - 32 * j];
      mbarrier_arrive(empty + s);
    }
  }
}

__global__ void bulk(const float* x, float* y) {
  __shared__ __align__(16) float tile[256];
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) mbarrier_init(&barrier, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(&barrier, sizeof(tile));
    bulk_copy(tile, x, sizeof(tile), &barrier);
  }
  mbarrier_wait(&barrier, 0);
  y[threadIdx.x] = tile[255 - threadIdx.x];
}

// Warps 0 and 1 hand over to warps 2 and 3 through barriers that half of them do not wait at.
__global__ void named_barriers(const float* x, float* y) {
  __shared__ float tile[64];
  const int warp = threadIdx.x / 32, role = warp / 2, i = threadIdx.x % 64;
  for (int round = 0; round < 3; ++round) {
    if (role == 0) {
      if (round > 0) barrier_sync(2, 128);
      tile[i] = x[round * 64 + i];
      barrier_arrive(1, 128);
    } else {
      barrier_sync(1, 128);
      y[round * 64 + i] = tile[63 - i];
      if (round < 2) barrier_arrive(2, 128);
    }
  }
}

__global__ void cp_async_zero_fill(const float* x, float* y, int n) {
  __shared__ __align__(16) float tile[128];
  const int at = threadIdx.x * 4, left = n - at;
  cp_async<16>(tile + at, left > 0 ? x + at : x, left <= 0 ? 0 : left >= 4 ? 16 : left * 4);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) y[at + i] = tile[at + i];
}

__global__ void conversions(const float* x, float* half, float* brain, float* e4m3, float* back) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  half[i] = float_of(round_to<f16>(x[i]));
  brain[i] = float_of(round_to<bf16>(x[i]));
  e4m3[i] = float_of_e4m3(round_to_e4m3(x[i]));
  back[i] = unpack<f16>(pack<f16>(1.0f, x[i]))[1];
}

// Stride 1 is free of conflicts, stride 2 has two words a bank, stride 32 all in one.
__global__ void strides(float* y, int stride) {
  float* tile = dynamic_shared<float>();
  tile[threadIdx.x * stride] = 1.0f;
  y[threadIdx.x * stride] = 2.0f;
}

// Each block waits for the one before it, as stream-K partners do.
__global__ void chain(uint32_t* done, float* y) {
  if (threadIdx.x == 0) {
    while (blockIdx.x > 0 && load_acquire(done + blockIdx.x - 1) == 0) {
    }
  }
  __syncthreads();
  y[blockIdx.x * 32 + threadIdx.x] =
      blockIdx.x > 0 ? y[(blockIdx.x - 1) * 32 + threadIdx.x] + 1.0f : 0.0f;
  __syncthreads();
  if (threadIdx.x == 0) store_release(done + blockIdx.x, 1);
}

// The first block waits for the last, which may never be on the device with it.
__global__ void backward_chain(uint32_t* done, float* y) {
  if (blockIdx.x == 0) {
    while (load_acquire(done + gridDim.x - 1) == 0) {
    }
  }
  y[blockIdx.x * 32 + threadIdx.x] = 0.0f;
  if (threadIdx.x == 0) store_release(done + blockIdx.x, 1);
}

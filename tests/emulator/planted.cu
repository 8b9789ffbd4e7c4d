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

// Past the end of one variable, into what is behind it.
__global__ void past_static_array(const float* x, float* y) {
  __shared__ float first[64];
  __shared__ float second[64];
  first[threadIdx.x + (threadIdx.x == 63)] = x[threadIdx.x];   // BUG
  second[threadIdx.x + (threadIdx.x == 63)] = x[threadIdx.x];  // BUG
  __syncthreads();
  y[threadIdx.x] = first[63 - threadIdx.x] + second[63 - threadIdx.x];
}

// Before its beginning.
__global__ void before_static_array(const float* x, float* y) {
  __shared__ float first[64];
  __shared__ float second[64];
  const int i = threadIdx.x;
  first[i] = second[i] = x[i];
  __syncthreads();
  y[i] = first[i - (i == 0)] + second[i - (i == 0)];  // BUG
}

__global__ void copy_left_at_the_end(const float* x, float* y) {
  __shared__ __align__(16) float tile[128];
  cp_async<16>(&tile[threadIdx.x * 4], x + threadIdx.x * 4);  // BUG
  cp_async_commit();
  y[threadIdx.x] = 0;
}

__global__ void bulk_copy_left_at_the_end(const float* x, float* y) {
  __shared__ __align__(16) float tile[128];
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) {
    mbarrier_init(&barrier, 1);
    mbarrier_arrive_expect(&barrier, 512);
    bulk_copy(tile, x, 512, &barrier);  // BUG
  }
  y[threadIdx.x] = 0;
}

// --- several blocks -----------------------------------------------------------------------------

// Two blocks write the same places.
__global__ void blocks_write_together(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x];  // BUG
}

// One block writes what another reads.
__global__ void blocks_share_no_order(const float* x, float* y) {
  if (blockIdx.x == 0)
    y[threadIdx.x] = x[threadIdx.x];  // BUG
  else
    y[64 + threadIdx.x] = y[threadIdx.x];  // BUG
}

// Lanes of one block.
__global__ void global_without_barrier(const float* x, float* y) {
  y[blockIdx.x * 64 + threadIdx.x] = x[threadIdx.x];
  y[blockIdx.x * 64 + threadIdx.x] += y[blockIdx.x * 64 + (threadIdx.x ^ 1)];  // BUG
}

// Blocks leave their parts, and the last to count itself adds them up: fence, barrier and counter
// together order that.
template <bool Fence, bool Barrier, bool Counter>
__device__ __forceinline__ void last_block_adds(const float* x, float* y) {
  __shared__ bool last;
  y[blockIdx.x * 32 + threadIdx.x] = x[threadIdx.x];  // BUG
  if (Fence) __threadfence();
  if (Barrier) __syncthreads();
  if (threadIdx.x == 0) {
    auto* const counter = reinterpret_cast<unsigned*>(y + 127);
    last = Counter ? atomicAdd(counter, 1u) == gridDim.x - 1 : blockIdx.x == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  float sum = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x * 32; i += 32) sum += y[i];  // BUG
  y[64 + threadIdx.x] = sum;
}
__global__ void last_block(const float* x, float* y) { last_block_adds<true, true, true>(x, y); }
__global__ void no_fence(const float* x, float* y) { last_block_adds<false, true, true>(x, y); }
__global__ void no_barrier(const float* x, float* y) { last_block_adds<true, false, true>(x, y); }
__global__ void no_counter(const float* x, float* y) { last_block_adds<true, true, false>(x, y); }

// Each block adds to what the one before it passed on.
__global__ void chain(const float* x, float* y) {
  auto* const turn = reinterpret_cast<uint32_t*>(y + 127);
  if (threadIdx.x == 0)
    while (load_acquire(turn) != blockIdx.x) {
    }
  __syncthreads();
  y[threadIdx.x] += x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) store_release(turn, blockIdx.x + 1);
}

// The same as it is written without PTX.
__global__ void volatile_chain(const float* x, float* y) {
  auto* const turn = reinterpret_cast<volatile unsigned*>(y + 127);
  if (threadIdx.x == 0)
    while (*turn != blockIdx.x) __nanosleep(10);
  __syncthreads();
  y[threadIdx.x] += x[threadIdx.x];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *turn = blockIdx.x + 1;
}

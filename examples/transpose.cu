// A matrix transpose through shared memory, for `pyllm emulate examples/transpose.cu`. With
// -D PLAIN it does without (and moves eight times the bytes), with -D CONFLICTS its tile has no
// padding, with -D RACE it has no barrier: the emulator tells each of them, with no GPU.
#ifdef CONFLICTS
constexpr int kRow = 32;
#else
constexpr int kRow = 33;
#endif

__global__ void transpose(const float* in, float* out, int n) {
#ifdef PLAIN
  const int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
  for (int i = 0; i < 32; i += 8) out[x * n + y + i] = in[(y + i) * n + x];
#else
  __shared__ float tile[32 * kRow];
  const int x = blockIdx.x * 32, y = blockIdx.y * 32;
  for (int i = threadIdx.y; i < 32; i += 8)
    tile[i * kRow + threadIdx.x] = in[(y + i) * n + x + threadIdx.x];
#ifndef RACE
  __syncthreads();
#endif
  for (int i = threadIdx.y; i < 32; i += 8)
    out[(x + i) * n + y + threadIdx.x] = tile[threadIdx.x * kRow + i];
#endif
}

// Stream-K: the steps of all tiles, one tile after the other, are cut into as many equal ranges as
// there are blocks, so that all multiprocessors work to the end whatever the shape. A tile that
// several blocks share is added up by the last of them to finish.
#pragma once
#include "cuda/primitives.cuh"

namespace pyllm::cuda {

// A place in the steps of all tiles.
struct Place {
  int tile, step;
  __device__ __forceinline__ void advance(int steps) {
    if (++step == steps) step = 0, ++tile;
  }
};

// How steps are divided among blocks: the first `longer` blocks have one grain of 2^grain steps
// more than the `least` grains of the others. (Divisions of 64 bits would be calls, and cost
// registers.)
struct Ranges {
  int least, longer, grain;

  static Ranges of(int64_t steps, int blocks, int grain) {
    const int64_t grains = steps >> grain;
    return {static_cast<int>(grains / blocks), static_cast<int>(grains % blocks), grain};
  }
  __device__ __forceinline__ int first_step(int block) const {
    return (block * least + min(block, longer)) << grain;
  }
  // The block whose range holds a step.
  __device__ __forceinline__ int block_with(int step) const {
    const int at = step >> grain, shorter = at - longer * (least + 1);
    return shorter < 0 ? at / (least + 1) : longer + shorter / least;
  }
};

// For all threads of a block, after they have stored their part of a tile: whether the `others` had
// done so before; then theirs can be read. `arrived` is zero before and after.
__device__ __forceinline__ bool last_to_arrive(uint32_t* arrived, int others) {
  __threadfence();
  __syncthreads();
  __shared__ bool all_there;
  if (threadIdx.x == 0) {
    all_there = atomic_add_acq_rel(arrived, 1) == static_cast<uint32_t>(others);
    if (all_there) *arrived = 0;  // for the next launch
  }
  __syncthreads();
  return all_there;
}

}  // namespace pyllm::cuda

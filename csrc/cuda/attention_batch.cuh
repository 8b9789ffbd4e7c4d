// Which rows a block works on, and where its results go.
#pragma once
#include "cuda/attention_tile.cuh"

namespace pyllm::cuda {

// Where a sequence of a ragged batch begins, and its length; inside of the tensor whatever the
// integers say.
struct Piece {
  int begin, length;
  __device__ __forceinline__ Piece(int begin, int length) : begin(begin), length(length) {}
  __device__ __forceinline__ Piece(const int32_t* cu_seqlens, int b, int total) {
    begin = min(max(cu_seqlens[b], 0), total);
    length = min(max(cu_seqlens[b + 1], begin), total) - begin;
  }
};

// Counts the tiles of a ragged batch sequence by sequence, 32 at a time: returns the sequence that
// has tile `index` and makes that the index in it, or -1 if there are fewer tiles. All lanes of a
// warp call it.
__device__ __forceinline__ int find_sequence(const int32_t* cu_seqlens, int batch, int total,
                                             int heads, int tile_rows, int& index) {
  const int lane = lane_id();
  for (int first = 0; first < batch; first += 32) {
    int tiles = 0;
    if (first + lane < batch)
      tiles = (Piece(cu_seqlens, first + lane, total).length * heads + tile_rows - 1) / tile_rows;
    int up_to = tiles;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, up_to, distance);
      if (lane >= distance) up_to += other;
    }
    const unsigned beyond = __ballot_sync(0xffffffffu, up_to > index);
    if (beyond) {
      const int found = __ffs(static_cast<int>(beyond)) - 1;
      index -= __shfl_sync(0xffffffffu, up_to - tiles, found);
      return first + found;
    }
    index -= __shfl_sync(0xffffffffu, up_to, 31);
  }
  return -1;
}

// The rows of a tile in a tensor [tokens, heads, dim], from query `token` and head `head` on.
template <class T>
struct RowsOf {
  T* data;
  int64_t token_stride, head_stride;
  int first_row, rows, heads;
  __device__ __forceinline__ T* operator()(int r) const {
    const int row = first_row + r;
    return row < rows ? data + row / heads * token_stride + row % heads * head_stride : nullptr;
  }
};

// Rounds o times factor(m, h) and writes it, through the shared memory that held the warp's own
// queries, in whole rows. Where values were dropped, adds dropped_sum(row, column).
template <class S, class Factor, class Dropped>
__device__ __forceinline__ void write_rows(const RowState<S>& state, bool dropped, Factor factor,
                                           typename S::T* tile, int dim,
                                           const RowsOf<typename S::T>& out, Dropped dropped_sum) {
  using T = typename S::T;
  cp_async_wait<0>();  // where there was no key, nobody has waited for the queries yet
  const bool any_dropped = __syncthreads_or(dropped);
  const int lane = lane_id(), first = threadIdx.x / 32 * S::kWarpRows;
#pragma unroll
  for (int m = 0; m < S::M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float f = factor(m, h);
#pragma unroll
      for (int n = 0; n < S::kDim / 8; ++n)
        store(tile + swizzled<S::kDim>(tile_row<S>(m, h), n) + lane % 4 * 2,
              pack<T>(state.o[m][n][2 * h] * f, state.o[m][n][2 * h + 1] * f));
    }
  __syncwarp();
  if (any_dropped) {
#pragma unroll 1
    for (int i = lane; i < S::kWarpRows * dim; i += 32) {
      const int row = first + i / dim, column = i % dim;
      T* const x = tile + swizzled<S::kDim>(row, column / 8) + column % 8;
      if (out(row)) store(x, round_to<T>(float_of(load<T>(x)) + dropped_sum(row, column)));
    }
    __syncwarp();
  }
#pragma unroll 1
  for (int i = lane; i < S::kWarpRows * S::kChunks; i += 32) {
    const int row = first + i / S::kChunks, chunk = i % S::kChunks;
    T* to = out(row);
    if (to && chunk * 8 < dim)
      store(to + chunk * 8, load<Vec<T, 8>>(tile + swizzled<S::kDim>(row, chunk)));
  }
}

}  // namespace pyllm::cuda

// What the forward and the backward kernels of the normalizations share: where a row lies and which
// columns of it a thread holds.
//
// A row belongs to blockDim.x threads, and threadIdx.y says which of a block's rows. Thread x holds
// vectors x, x + blockDim.x, x + 2 blockDim.x, ... of N values (16 bytes). Rows that 16-byte
// accesses do not fit have the same columns in the same threads, read one value at a time: the sums
// have the same order, and the results the same bits, however a row lies in memory.
#pragma once
#include "cuda/dispatch.cuh"
#include "cuda/norm.h"
#include "cuda/primitives.cuh"
#include "cuda/reduce.cuh"

namespace pyllm::cuda {

inline constexpr int kMaxThreads = 1024;
// Where a thread holds so much that it needs 128 registers.
inline constexpr int kWideThreads = 512;

template <class T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// [T, H, D], row r is (r / H, r % H).
struct Rows {
  void* data;
  int64_t stride[2];

  template <class T>
  __device__ __forceinline__ T* at(unsigned r, unsigned heads) const {
    const unsigned block = heads == 1 ? r : r / heads;
    return static_cast<T*>(data) + block * stride[0] + (r - block * heads) * stride[1];
  }
};
inline Rows rows_of(const Tensor& t) { return {t.data, {t.stride[0], t.stride[1]}}; }

// A vector of [D] parameters.
struct Parameter {
  const void* data;
  DType dtype;
};
inline Parameter parameter_of(const Tensor& t) { return {t.data, t.dtype}; }

// Columns [at, at + N) of a row; with `vectors` they all exist, else those that do not are zero.
// Once: no kernel writes the row meanwhile, and it is not read again.
template <class T, int N, bool Once = true>
__device__ __forceinline__ Vec<T, N> load_columns(const T* row, int at, int width, bool vectors) {
  if (vectors) return Once ? load_once<Vec<T, N>>(row + at) : load<Vec<T, N>>(row + at);
  Vec<T, N> v;
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = at + i < width ? load<T>(row + at + i) : T{};
  return v;
}
template <class T, int N>
__device__ __forceinline__ void store_columns(T* row, const Vec<T, N>& v, int at, int width,
                                              bool vectors) {
  if (vectors) return store(row + at, v);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (at + i < width) store<T>(row + at + i, v[i]);
}

// The same of a parameter of dtype W as floats; every block reads it, so it may stay in L1.
template <class W, int N>
__device__ __forceinline__ void load_parameter(float (&w)[N], const void* data, int at, int width,
                                               bool vectors) {
  constexpr int kStep = N < kVector<W> ? N : kVector<W>;
  const W* p = static_cast<const W*>(data) + at;
#pragma unroll
  for (int i = 0; i < N; i += kStep)
    if (vectors) {
      const auto v = load<Vec<W, kStep>>(p + i);
#pragma unroll
      for (int j = 0; j < kStep; ++j) w[i + j] = float_of(v[j]);
    } else {
#pragma unroll
      for (int j = i; j < i + kStep; ++j) w[j] = at + j < width ? float_of(load<W>(p + j)) : 0.0f;
    }
}

// How many threads, `most` or fewer, share a row of this many vectors when each holds k, and how
// many rows make a block of about `block` threads.
inline dim3 row_threads(int64_t vectors, int k, int most, int block) {
  const int64_t wanted = (vectors + k - 1) / k;
  int threads = 1;
  while (threads < 32 && threads < wanted) threads *= 2;
  if (wanted > 32) threads = static_cast<int>(wanted < most ? (wanted + 31) / 32 * 32 : most);
  return dim3(threads, threads < block ? block / threads : 1);
}

}  // namespace pyllm::cuda

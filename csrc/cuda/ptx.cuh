// What the headers of primitives.cuh begin with.
#pragma once
#include "cuda/launch.cuh"

// The emulated body of a primitive, or the device's.
#ifdef PYLLM_EMULATOR
#define PYLLM_PTX(emulated, ...) emulated
#else
#define PYLLM_PTX(emulated, ...) __VA_ARGS__
#endif

namespace pyllm::cuda {

// N values that one instruction moves.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
  __host__ __device__ T& operator[](int i) { return v[i]; }
  __host__ __device__ const T& operator[](int i) const { return v[i]; }
};

}  // namespace pyllm::cuda

// Every PTX instruction that our kernels use, each with a device body and an emulated one. What
// CUDA C++ itself offers (__syncthreads, __shfl_xor_sync, atomicAdd, __dp4a, ...) is used by its
// own name.
#pragma once
#include "cuda/ptx_arithmetic.cuh"
#include "cuda/ptx_async.cuh"
#include "cuda/ptx_matrix.cuh"
#include "cuda/ptx_memory.cuh"

// What libpyllm_cuda and libpyllm_emulator export: a table of launchers, one an op. A launcher has
// checked arguments from its binding, picks the instance and the grid, and enqueues its kernels.
#pragma once
#include "cuda/flash_attention.h"
#include "cuda/norm.h"
#include "cuda/paged_attention.h"
#include "cuda/quant_matmul.h"
#include "cuda/quant_rows_matmul.h"

namespace pyllm::cuda {

// Null, or what went wrong; valid until this thread's next launch.
using Status = const char*;
using Stream = void*;  // a cudaStream_t

struct Kernels {
#define PYLLM_CUDA_KERNEL(function, Args) Status (*function)(const Args&, Stream);
#include "cuda/kernels.def"
#undef PYLLM_CUDA_KERNEL
};

#define PYLLM_CUDA_KERNEL(function, Args) Status function(const Args&, Stream);
#include "cuda/kernels.def"
#undef PYLLM_CUDA_KERNEL

}  // namespace pyllm::cuda

extern "C" __attribute__((visibility("default"))) const pyllm::cuda::Kernels* pyllm_cuda_kernels();

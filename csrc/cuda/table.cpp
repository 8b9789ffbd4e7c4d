#include "cuda/kernels.h"

const pyllm::cuda::Kernels* pyllm_cuda_kernels() {
  static const pyllm::cuda::Kernels table = {
#define PYLLM_CUDA_KERNEL(function, Args) .function = &pyllm::cuda::function,
#include "cuda/kernels.def"
#undef PYLLM_CUDA_KERNEL
  };
  return &table;
}

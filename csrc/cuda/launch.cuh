// Launching a kernel, on the device or on the emulator, from the same source.
#pragma once
#include <cstdint>
#include <cstdio>
#include <tuple>
#include <type_traits>
#include <utility>

#include "core/half.h"
#include "core/tensor.h"
#include "cuda/kernels.h"

#ifdef PYLLM_EMULATOR
#include "emulator/emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace pyllm::cuda {

// Enqueues `kernel` on the stream: launch("rms_norm", rms_norm_kernel<T>, grid, block, shared
// bytes, stream, arguments...). Does not wait for it.
template <class... P>
Status launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
              Stream stream, std::type_identity_t<P>... arguments) {
#ifdef PYLLM_EMULATOR
  (void)stream;
  using Call = std::pair<void (*)(P...), std::tuple<P...>>;
  const Call call{kernel, {arguments...}};
  const emu::LaunchConfig config{{grid.x, grid.y, grid.z},
                                 {block.x, block.y, block.z},
                                 shared_bytes,
                                 name,
                                 reinterpret_cast<const void*>(kernel)};
  const auto lane = [](const void* c) {
    const auto* call = static_cast<const Call*>(c);
    std::apply(call->first, call->second);
  };
  return emu::launch(config, lane, &call, sizeof(call));
#else
  static thread_local char message[256];
  const void* function = reinterpret_cast<const void*>(kernel);
  const char* what = "cudaFuncSetAttribute";
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 << 10)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    void* pointers[] = {&arguments..., nullptr};
    what = "cudaLaunchKernel";
    error = cudaLaunchKernel(function, grid, block, pointers, shared_bytes,
                             static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it was reported: the next launch starts afresh
  snprintf(message, sizeof(message), "%s: %s: %s", name, what, cudaGetErrorString(error));
  return message;
#endif
}

// How much dynamic shared memory a block of the current device may have, less 1 KB for what a
// kernel declares statically.
inline int64_t max_shared_bytes() {
  int bytes = 227 << 10;
#ifndef PYLLM_EMULATOR
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess)
    bytes = 48 << 10;
#endif
  return bytes - 1024;
}

}  // namespace pyllm::cuda

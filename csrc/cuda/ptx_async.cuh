// Asynchronous copies to shared memory, and barriers.
#pragma once
#include "cuda/ptx_memory.cuh"

namespace pyllm::cuda {

// Copies Bytes = 4, 8 or 16 from global to shared memory; the last Bytes - source_bytes are zeros.
template <int Bytes = 16>
__device__ __forceinline__ void cp_async(void* shared, const void* global,
                                         int source_bytes = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
#ifdef PYLLM_EMULATOR
  emu::cp_async(shared, global, Bytes, source_bytes);
#else
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(source_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(Bytes), "r"(source_bytes)
                 : "memory");
#endif
}
__device__ __forceinline__ void cp_async_commit() {
  PYLLM_PTX(emu::cp_async_commit(), asm volatile("cp.async.commit_group;" :: : "memory"));
}
// Waits until at most GroupsLeft of this thread's committed groups have not landed. Other threads
// see the data after a barrier.
template <int GroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
  PYLLM_PTX(emu::cp_async_wait(GroupsLeft),
            asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory"));
}

// --- barriers ---

// Barrier 1 to 15 (0 is __syncthreads) among `threads` of the block, whole warps.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  PYLLM_PTX(emu::barrier_sync(id, threads),
            asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"));
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  PYLLM_PTX(emu::barrier_arrive(id, threads),
            asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"));
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  PYLLM_PTX(emu::mbarrier_init(barrier, arrivals),
            asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                         "r"(arrivals) : "memory"));
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  PYLLM_PTX(emu::mbarrier_arrive(barrier, 0),
            asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t, [%0];}" ::"r"(
                shared_address(barrier)) : "memory"));
}
// Arrives once this thread's cp.async so far have landed.
__device__ __forceinline__ void cp_async_mbarrier_arrive(uint64_t* barrier) {
  PYLLM_PTX(emu::cp_async_mbarrier_arrive(barrier),
            asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(
                shared_address(barrier)) : "memory"));
}
// Waits for the end of the phase with this parity; the first phase has parity 0.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
#ifdef PYLLM_EMULATOR
  while (!emu::mbarrier_try_wait(barrier, parity)) {
  }
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred p;\n"
      "wait: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
      "@!p bra wait;}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{.reg .pred p;\n"
      "wait: mbarrier.test_wait.parity.shared.b64 p, [%0], %1;\n"
      "@!p bra wait;}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// Since sm_90; before, kernels that call these trap.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
#if defined(PYLLM_EMULATOR)
  emu::mbarrier_arrive(barrier, bytes);
#elif __CUDA_ARCH__ >= 900
  asm volatile("{.reg .b64 t; mbarrier.arrive.expect_tx.shared.b64 t, [%0], %1;}" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}
// One thread copies a multiple of 16 bytes, whose arrival counts at the barrier.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, int bytes,
                                          uint64_t* barrier) {
#if defined(PYLLM_EMULATOR)
  emu::bulk_copy(shared, global, bytes, barrier);
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#else
  __trap();
#endif
}

}  // namespace pyllm::cuda

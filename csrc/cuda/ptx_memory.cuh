// Loads and stores, and what orders them between blocks.
#pragma once
#include "cuda/ptx.cuh"

namespace pyllm::cuda {

// The block's dynamic shared memory.
template <class T = unsigned char>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef PYLLM_EMULATOR
  return static_cast<T*>(emu::dynamic_shared());
#else
  extern __shared__ __align__(128) unsigned char pyllm_shared[];
  return reinterpret_cast<T*>(pyllm_shared);
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return PYLLM_PTX(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p)),
                   static_cast<uint32_t>(__cvta_generic_to_shared(p)));
}

// One access of sizeof(V) = 1, 2, 4, 8 or 16 bytes; V is a scalar or a Vec. Shared or global
// memory.
template <class V>
__device__ __forceinline__ V load(const void* p) {
  V value;
  PYLLM_PTX(emu::load(&value, p, sizeof(V)), value = *static_cast<const V*>(p));
  return value;
}
template <class V>
__device__ __forceinline__ void store(void* p, const V& value) {
  PYLLM_PTX(emu::store(p, &value, sizeof(V)), *static_cast<V*>(p) = value);
}

// The same from global memory that no kernel writes meanwhile, read once: not kept in L1.
template <class V>
__device__ __forceinline__ V load_once(const void* p) {
  V value;
#ifdef PYLLM_EMULATOR
  emu::load(&value, p, sizeof(V));
#else
  if constexpr (sizeof(V) == 16) {
    uint4 r;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "l"(p));
    value = *reinterpret_cast<V*>(&r);
  } else if constexpr (sizeof(V) == 8) {
    uint2 r;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(r.x), "=r"(r.y)
                 : "l"(p));
    value = *reinterpret_cast<V*>(&r);
  } else {
    value = *static_cast<const V*>(p);
  }
#endif
  return value;
}

// Ordered with what other blocks do: a counter or flag that blocks pass work with.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
#ifdef PYLLM_EMULATOR
  return emu::load_acquire(p);
#else
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
#endif
}
__device__ __forceinline__ void store_release(uint32_t* p, uint32_t value) {
  PYLLM_PTX(emu::store_release(p, value),
            asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory"));
}
// Returns the value before; everything this thread did is ordered before it, and what others did
// before theirs is ordered before what follows.
__device__ __forceinline__ uint32_t atomic_add_acq_rel(uint32_t* p, uint32_t value) {
#ifdef PYLLM_EMULATOR
  return static_cast<uint32_t>(
      emu::atomic(emu::Atomic::Add, emu::Number::U32, p, value, 0, emu::kAcquire | emu::kRelease));
#else
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(p), "r"(value)
               : "memory");
  return before;
#endif
}

// The same x, of which the compiler knows nothing: what is computed from it inside of a loop is not
// computed before the loop and kept in registers.
__device__ __forceinline__ int opaque(int x) {
#ifndef PYLLM_EMULATOR
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Makes the compiler forget what it derived from these 16 bytes: values unpacked from them are
// unpacked again after this, not kept in registers meanwhile.
template <class V>
__device__ __forceinline__ void forget(V& value) {
  static_assert(sizeof(V) == 16);
#ifndef PYLLM_EMULATOR
  uint4& r = reinterpret_cast<uint4&>(value);
  asm volatile("" : "+r"(r.x), "+r"(r.y), "+r"(r.z), "+r"(r.w));
#else
  (void)value;
#endif
}

}  // namespace pyllm::cuda

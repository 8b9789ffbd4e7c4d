// Every PTX instruction that our kernels use, each with a device body and an emulated one. What
// CUDA C++ itself offers (__syncthreads, __shfl_xor_sync, atomicAdd, __dp4a, ...) is used by its
// own name.
//
// Layouts of fragments are those of the PTX ISA ("Matrix Fragments for mma.m16n8k16" and so on),
// with g = lane / 4 and t = lane % 4.
#pragma once
#include "cuda/launch.cuh"

#ifdef PYLLM_EMULATOR
#define PYLLM_PTX(emulated, ...) emulated
#else
#define PYLLM_PTX(emulated, ...) __VA_ARGS__
#endif

namespace pyllm::cuda {

// --- memory -------------------------------------------------------------------------------------

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

// N values that one instruction moves.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
  __host__ __device__ T& operator[](int i) { return v[i]; }
  __host__ __device__ const T& operator[](int i) const { return v[i]; }
};

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

// --- asynchronous copies (cp.async) ---

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

// --- matrices ---

// Loads N = 1, 2 or 4 matrices of 8 x 8 16-bit values. Lanes 8 m to 8 m + 7 give the addresses of
// the rows of matrix m, 16 bytes each. A lane gets row g, columns 2 t and 2 t + 1 of each, or with
// Transposed the same of its transpose.
template <int N, bool Transposed = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4);
#ifdef PYLLM_EMULATOR
  const emu::U4 loaded = emu::ldmatrix(N, Transposed, row);
  for (int i = 0; i < N; ++i) r[i] = loaded.v[i];
#else
  const uint32_t address = shared_address(row);
  if constexpr (N == 1 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(address)
                 : "memory");
  if constexpr (N == 1 && Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(address)
                 : "memory");
  if constexpr (N == 2 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  if constexpr (N == 2 && Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  if constexpr (N == 4 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  if constexpr (N == 4 && Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}

// d = a b + c for a 16 x 16 and b 16 x 8, T = f16 or bf16, accumulated in float; d may be c.
// Registers hold pairs: a[0], a[1]: rows g and g + 8, columns 2 t and 2 t + 1; a[2], a[3]: the
// same, columns
// + 8. b[0], b[1]: column g, rows 2 t and 2 t + 1, and those + 8.
// d[0], d[1]: row g, columns 2 t and 2 t + 1; d[2], d[3]: row g + 8.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], const float (&c)[4]) {
#ifdef PYLLM_EMULATOR
  constexpr auto kType = std::is_same_v<T, f16> ? emu::Half::F16 : emu::Half::BF16;
  const emu::F4 sum = emu::mma_m16n8k16(kType, {{a[0], a[1], a[2], a[3]}}, {{b[0], b[1]}},
                                        {{c[0], c[1], c[2], c[3]}});
  for (int i = 0; i < 4; ++i) d[i] = sum.v[i];
#else
#define PYLLM_MMA(type)                                                                       \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                         \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"     \
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), \
                 "f"(c[1]), "f"(c[2]), "f"(c[3]))
  if constexpr (std::is_same_v<T, f16>)
    PYLLM_MMA("f16");
  else
    PYLLM_MMA("bf16");
#undef PYLLM_MMA
#endif
}
// d += a b
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  mma_m16n8k16<T>(d, a, b, d);
}

// d += a b for a 16 x 32 and b 32 x 8 of 8-bit integers (int8_t or uint8_t), exact in int32.
// a[0], a[1]: rows g and g + 8, columns 4 t to 4 t + 3; a[2], a[3]: the same, columns + 16.
// b[0], b[1]: column g, rows 4 t to 4 t + 3, and those + 16. d as above.
template <class A, class B>
__device__ __forceinline__ void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
#ifdef PYLLM_EMULATOR
  const emu::S4 sum =
      emu::mma_m16n8k32(std::is_signed_v<A>, std::is_signed_v<B>, {{a[0], a[1], a[2], a[3]}},
                        {{b[0], b[1]}}, {{d[0], d[1], d[2], d[3]}});
  for (int i = 0; i < 4; ++i) d[i] = sum.v[i];
#else
#define PYLLM_MMA(a_type, b_type)                                                     \
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." a_type "." b_type             \
               ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_signed_v<A> && std::is_signed_v<B>)
    PYLLM_MMA("s8", "s8");
  else if constexpr (std::is_signed_v<A>)
    PYLLM_MMA("s8", "u8");
  else if constexpr (std::is_signed_v<B>)
    PYLLM_MMA("u8", "s8");
  else
    PYLLM_MMA("u8", "u8");
#undef PYLLM_MMA
#endif
}

// --- arithmetic ---

// 2^x to about 2 ulp; subnormal results become zero.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef PYLLM_EMULATOR
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ float tanh_approx(float x) {
#ifdef PYLLM_EMULATOR
  return std::tanh(x);
#else
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Any function of three bits: Table is f(0xf0, 0xcc, 0xaa).
template <int Table>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#ifdef PYLLM_EMULATOR
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i)
    if (Table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
#else
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(Table));
  return result;
#endif
}

// --- number formats ---

__device__ __forceinline__ float float_of(float x) { return x; }
__device__ __forceinline__ float float_of(bf16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float float_of(f16 x) {
#ifdef PYLLM_EMULATOR
  return to_float(x);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

// To nearest, ties to even.
template <class T>
__device__ __forceinline__ T round_to(float x) {
#ifdef PYLLM_EMULATOR
  return from_float<T>(x);
#else
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    T y;
    if constexpr (std::is_same_v<T, f16>)
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    else
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
  }
#endif
}

// Two halves in a register, as mma takes them: `lo` in the low bits.
template <class T>
__device__ __forceinline__ uint32_t pack(float lo, float hi) {
#ifdef PYLLM_EMULATOR
  return from_float<T>(lo).bits | static_cast<uint32_t>(from_float<T>(hi).bits) << 16;
#else
  uint32_t r;
  if constexpr (std::is_same_v<T, f16>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#endif
}
template <class T>
__device__ __forceinline__ Vec<float, 2> unpack(uint32_t x) {
  return {float_of(T{static_cast<uint16_t>(x)}), float_of(T{static_cast<uint16_t>(x >> 16)})};
}

// Arithmetic on pairs of halves: a b + c, each rounded once.
template <class T>
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
#ifdef PYLLM_EMULATOR
  const auto x = unpack<T>(a), y = unpack<T>(b), z = unpack<T>(c);
  // Products of halves are exact in double, and so is the sum but for cases rounding hides.
  return pack<T>(static_cast<float>(double{x[0]} * y[0] + z[0]),
                 static_cast<float>(double{x[1]} * y[1] + z[1]));
#else
  uint32_t r;
  if constexpr (std::is_same_v<T, f16>)
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
#endif
}
__device__ __forceinline__ uint32_t sub2_f16(uint32_t a, uint32_t b) {
#ifdef PYLLM_EMULATOR
  const auto x = unpack<f16>(a), y = unpack<f16>(b);
  return pack<f16>(x[0] - y[0], x[1] - y[1]);
#else
  uint32_t r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#endif
}

// fp8 e4m3 (4 exponent bits, bias 7, no infinity, 0x7f is NaN) in integer arithmetic, so that it
// also runs before sm_89.
__device__ __forceinline__ float float_of_e4m3(uint8_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x80) << 24, rest = x & 0x7f;
  if (rest == 0x7f) return __uint_as_float(sign | 0x7fc00000u);
  // The bits as those of a float with a small exponent, times 2^120.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 20) * 0x1p120f));
}
// Two of them, in the low bits of x, as two f16.
__device__ __forceinline__ uint32_t widen_e4m3(uint32_t x) {
#if defined(PYLLM_EMULATOR) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890)
  return pack<f16>(float_of_e4m3(static_cast<uint8_t>(x)),
                   float_of_e4m3(static_cast<uint8_t>(x >> 8)));
#else
  uint32_t r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(static_cast<uint16_t>(x)));
  return r;
#endif
}
// To nearest, ties to even; beyond 448 saturates.
__device__ __forceinline__ uint8_t round_to_e4m3(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7f);
  if (rest >= 0x43e00000u) return static_cast<uint8_t>(sign | 0x7e);  // 448 and beyond
  if (rest < 0x3c800000u)  // below 2^-6, subnormal: let the adder round at 2^-9
    return static_cast<uint8_t>(sign |
                                (__float_as_uint(__uint_as_float(rest) + 0x1p14f) - 0x46800000u));
  const uint32_t rounded = rest + 0x7ffffu + (rest >> 20 & 1) - 0x3c000000u;
  return static_cast<uint8_t>(sign | rounded >> 20);
}

// Four values as round_to_e4m3 rounds them, the first in the low byte.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
#if !defined(PYLLM_EMULATOR) && __CUDA_ARCH__ >= 890
  uint16_t lo, hi;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(lo) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(hi) : "f"(d), "f"(c));
  return lo | static_cast<uint32_t>(hi) << 16;
#else
  return round_to_e4m3(a) | round_to_e4m3(b) << 8 | round_to_e4m3(c) << 16 |
         static_cast<uint32_t>(round_to_e4m3(d)) << 24;
#endif
}

}  // namespace pyllm::cuda

#undef PYLLM_PTX

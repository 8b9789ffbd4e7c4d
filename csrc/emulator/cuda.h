// CUDA C++ for an ordinary compiler: included before a .cu file (-include), it gives the language's
// keywords, built-in variables, vector types and functions. No CUDA toolkit is needed.
//
// Loads and stores need no wrapper: the file is compiled with -fsanitize=thread, which makes the
// compiler announce each of them to the emulator (memory.cpp).
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/emulator.h"

#define PYLLM_EMULATOR 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static
#define __align__(n) __attribute__((aligned(n)))
// A block stays on one thread of the host, so its shared variables are that thread's. `extern
// __shared__` arrays do not work: kernels call pyllm::cuda::dynamic_shared(), which also does on
// the device, and `pyllm emulate` rewrites such declarations. Before each variable is a gap, so
// that running past the end of one is not an access to the next.
#define __shared__ EMU_SHARED(__COUNTER__)
#define EMU_SHARED(n) EMU_SHARED_AFTER(n)
#define EMU_SHARED_AFTER(n)                       \
  thread_local uint32_t emu_gap_##n[32];          \
  ::emu::guard(emu_gap_##n, sizeof(emu_gap_##n)); \
  thread_local

#define threadIdx (::emu::thread_idx())
#define blockIdx (::emu::block_idx())
#define blockDim (::emu::block_dim())
#define gridDim (::emu::grid_dim())
inline constexpr int warpSize = 32;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define EMU_VECTORS(T, name)                                                         \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct name##3 { T x, y, z; };                                                     \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                 \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(int8_t, char)
EMU_VECTORS(uint8_t, uchar)
EMU_VECTORS(int16_t, short)
EMU_VECTORS(uint16_t, ushort)
EMU_VECTORS(int32_t, int)
EMU_VECTORS(uint32_t, uint)
EMU_VECTORS(float, float)
EMU_VECTORS(double, double)
EMU_VECTORS(long long, longlong)
#undef EMU_VECTORS

// --- barriers, votes, shuffles ------------------------------------------------------------------
#define EMU_FN inline __attribute__((always_inline))

EMU_FN void __syncthreads() { emu::sync_threads(); }
EMU_FN int __syncthreads_count(int p) { return emu::sync_threads(emu::Vote::Count, p); }
EMU_FN int __syncthreads_and(int p) { return emu::sync_threads(emu::Vote::And, p); }
EMU_FN int __syncthreads_or(int p) { return emu::sync_threads(emu::Vote::Or, p); }
EMU_FN void __syncwarp(unsigned mask = 0xffffffffu) { emu::sync_warp(mask); }
EMU_FN unsigned __activemask() { return emu::active_mask(); }
EMU_FN unsigned __ballot_sync(unsigned mask, int p) { return emu::ballot(mask, p); }
EMU_FN int __any_sync(unsigned mask, int p) { return emu::ballot(mask, p) != 0; }
EMU_FN int __all_sync(unsigned mask, int p) { return emu::ballot(mask, p) == mask; }

template <class T>
EMU_FN uint64_t emu_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
EMU_FN T emu_value(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
EMU_FN T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emu_value<T>(emu::shuffle(emu::Shuffle::Index, mask, emu_bits(value), source, width));
}
template <class T>
EMU_FN T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emu_value<T>(
      emu::shuffle(emu::Shuffle::Up, mask, emu_bits(value), static_cast<int>(delta), width));
}
template <class T>
EMU_FN T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emu_value<T>(
      emu::shuffle(emu::Shuffle::Down, mask, emu_bits(value), static_cast<int>(delta), width));
}
template <class T>
EMU_FN T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return emu_value<T>(emu::shuffle(emu::Shuffle::Xor, mask, emu_bits(value), lanes, width));
}
template <class T>
EMU_FN unsigned __match_any_sync(unsigned mask, T value) {
  return emu::match_any(mask, emu_bits(value));
}
template <class T>
EMU_FN unsigned __match_all_sync(unsigned mask, T value, int* predicate) {
  int all = 0;
  const unsigned matched = emu::match_all(mask, emu_bits(value), &all);
  *predicate = all;
  return matched;
}
EMU_FN unsigned __reduce_add_sync(unsigned mask, unsigned v) {
  return emu::reduce(emu::Reduce::Add, mask, v);
}
EMU_FN unsigned __reduce_max_sync(unsigned mask, unsigned v) {
  return emu::reduce(emu::Reduce::Max, mask, v);
}
EMU_FN unsigned __reduce_min_sync(unsigned mask, unsigned v) {
  return emu::reduce(emu::Reduce::Min, mask, v);
}
EMU_FN int __reduce_max_sync(unsigned mask, int v) {
  return static_cast<int>(emu::reduce(emu::Reduce::MaxSigned, mask, static_cast<uint32_t>(v)));
}
EMU_FN int __reduce_min_sync(unsigned mask, int v) {
  return static_cast<int>(emu::reduce(emu::Reduce::MinSigned, mask, static_cast<uint32_t>(v)));
}

// --- atomics and fences -------------------------------------------------------------------------
template <class T>
constexpr emu::Number emu_number() {
  if constexpr (std::is_same_v<T, float>) return emu::Number::F32;
  if constexpr (std::is_same_v<T, double>) return emu::Number::F64;
  if constexpr (sizeof(T) == 8) return emu::Number::U64;
  return std::is_signed_v<T> ? emu::Number::S32 : emu::Number::U32;
}
template <class T>
EMU_FN T emu_atomic(emu::Atomic op, T* at, T value, T compare = T()) {
  return emu_value<T>(
      emu::atomic(op, emu_number<T>(), at, emu_bits(value), emu_bits(compare), emu::kRelaxed));
}
#define EMU_ATOMIC(name, op)                            \
  template <class T>                                    \
  EMU_FN T name(T* at, std::type_identity_t<T> value) { \
    return emu_atomic<T>(emu::Atomic::op, at, value);   \
  }
EMU_ATOMIC(atomicAdd, Add)
EMU_ATOMIC(atomicMin, Min)
EMU_ATOMIC(atomicMax, Max)
EMU_ATOMIC(atomicAnd, And)
EMU_ATOMIC(atomicOr, Or)
EMU_ATOMIC(atomicXor, Xor)
EMU_ATOMIC(atomicExch, Exchange)
#undef EMU_ATOMIC
template <class T>
EMU_FN T atomicCAS(T* at, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return emu_atomic<T>(emu::Atomic::CompareExchange, at, value, compare);
}
EMU_FN void __threadfence() { emu::fence(); }
EMU_FN void __threadfence_block() { emu::fence(); }
EMU_FN void __nanosleep(unsigned) { emu::nanosleep(); }
[[noreturn]] EMU_FN void __trap() { emu::trap("__trap()"); }

template <class T>
EMU_FN T __ldg(const T* at) {
  T value;
  emu::load(&value, at, sizeof(T));
  return value;
}

// --- arithmetic ---------------------------------------------------------------------------------
EMU_FN int __float_as_int(float x) { return std::bit_cast<int>(x); }
EMU_FN unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
EMU_FN float __int_as_float(int x) { return std::bit_cast<float>(x); }
EMU_FN float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
EMU_FN int __popc(unsigned x) { return std::popcount(x); }
EMU_FN int __popcll(unsigned long long x) { return std::popcount(x); }
EMU_FN int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
EMU_FN int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }
EMU_FN int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
EMU_FN int __float2int_rz(float x) { return static_cast<int>(x); }
EMU_FN float __int2float_rn(int x) { return static_cast<float>(x); }
EMU_FN float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
EMU_FN float __frcp_rn(float x) { return 1.0f / x; }
EMU_FN float __fdividef(float x, float y) { return x / y; }
EMU_FN float __expf(float x) { return std::exp(x); }
EMU_FN float __logf(float x) { return std::log(x); }
EMU_FN float __log2f(float x) { return std::log2(x); }
EMU_FN float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
EMU_FN float __fadd_rn(float a, float b) { return a + b; }
EMU_FN float __fmul_rn(float a, float b) { return a * b; }
EMU_FN float __saturatef(float x) { return std::fmin(std::fmax(x, 0.0f), 1.0f); }
EMU_FN unsigned __umulhi(unsigned a, unsigned b) { return uint64_t{a} * b >> 32; }
template <class A, class B>
EMU_FN auto min(A a, B b) -> std::common_type_t<A, B> {
  return a < b ? a : b;
}
template <class A, class B>
EMU_FN auto max(A a, B b) -> std::common_type_t<A, B> {
  return a > b ? a : b;
}
EMU_FN float min(float a, float b) { return std::fmin(a, b); }
EMU_FN float max(float a, float b) { return std::fmax(a, b); }

// Byte i of the result is byte (selector >> 4 i & 7) of the eight bytes b:a.
EMU_FN unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned byte = bytes >> 8 * (selector >> 4 * i & 7) & 0xff;
    if (selector >> 4 * i & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}
EMU_FN int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i)
    c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}
EMU_FN unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> 8 * i & 0xff) * (b >> 8 * i & 0xff);
  return c;
}
EMU_FN unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
  return (uint64_t{hi} << 32 | lo) >> (shift & 31);
}

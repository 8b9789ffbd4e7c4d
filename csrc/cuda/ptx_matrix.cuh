// Tensor cores. Layouts of fragments are those of the PTX ISA ("Matrix Fragments for mma.m16n8k16"
// and so on), with g = lane / 4 and t = lane % 4.
#pragma once
#include "cuda/ptx_memory.cuh"

namespace pyllm::cuda {

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

}  // namespace pyllm::cuda

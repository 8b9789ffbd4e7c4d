// Quants to fragments of f16 or bf16, in registers: the bits of a quant are put into the mantissa
// of a constant (2^10 for f16, 2^7 for bf16), which is subtracted. All results are exact.
#pragma once
#include "cuda/primitives.cuh"

namespace pyllm::cuda {

// Each of the two halves of `x` is 1024 + q, 0 <= q < 1024; returns q - kOffset.
template <int kOffset>
__device__ __forceinline__ uint32_t minus_magic(uint32_t x) {
  constexpr uint32_t kHalf = 0x6400 + kOffset;
  return sub2_f16(x, kHalf << 16 | kHalf);
}

// One fragment of 4-bit quants, see core/quant_fragments.h: q - kOffset, kOffset 0 or 8.
template <class T, int kOffset>
__device__ __forceinline__ void dequantize(uint32_t (&a)[4], uint32_t word) {
  constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa;
  if constexpr (std::is_same_v<T, f16>) {
    // The nibble at bit 4 counts 16 times: 1024 + 16 q, which one fma turns to q - kOffset.
    constexpr uint32_t kHalf = kOffset ? 0xd480 : 0xd400;  // -(64 + kOffset)
#pragma unroll
    for (int r = 0; r < 4; r += 2) {
      a[r] = minus_magic<kOffset>(lop3<kAndOr>(word >> 4 * r, 0x000f000f, 0x64006400));
      a[r + 1] = fma2<f16>(lop3<kAndOr>(word >> 4 * r, 0x00f000f0, 0x64006400), 0x2c002c00,
                           kHalf << 16 | kHalf);
    }
  } else {
    constexpr uint32_t kHalf = 0xc300 + kOffset;  // -(128 + kOffset)
#pragma unroll
    for (int r = 0; r < 4; ++r)
      a[r] = fma2<bf16>(lop3<kAndOr>(word >> 4 * r, 0x000f000f, 0x43004300), 0x3f803f80,
                        kHalf << 16 | kHalf);
  }
}

// One fragment of 8-bit quants, kOffset 0 or 128.
template <class T, int kOffset>
__device__ __forceinline__ void dequantize(uint32_t (&a)[4], uint32_t low, uint32_t high) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const uint32_t word = r < 2 ? low : high;
    if constexpr (std::is_same_v<T, f16>) {
      a[r] = minus_magic<kOffset>(__byte_perm(word, 0x64646464, r % 2 ? 0x4342 : 0x4140));
    } else {
      // bf16 has no room for 2^8 + q: floats of 2^23 + q, of whose differences the upper halves
      // are exact.
      uint32_t value[2];
#pragma unroll
      for (int p = 0; p < 2; ++p)
        value[p] =
            __float_as_uint(__uint_as_float(__byte_perm(word, 0x4b000000, 0x7440 + r % 2 * 2 + p)) -
                            (8388608.0f + kOffset));
      a[r] = __byte_perm(value[0], value[1], 0x7632);
    }
  }
}

}  // namespace pyllm::cuda

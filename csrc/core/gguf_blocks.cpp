#include "core/gguf_blocks.h"

namespace pyllm {
namespace {

f16 half_at(const uint8_t* p) { return {static_cast<uint16_t>(p[0] | p[1] << 8)}; }

// Q5_0 and Q5_1: low nibbles as in Q4_0, the fifth bits in a 32-bit word, bit k for weight k.
void unpack_q5(const uint8_t* high, const uint8_t* nibbles, int add, uint8_t* q) {
  const uint32_t bits = high[0] | high[1] << 8 | high[2] << 16 | uint32_t{high[3]} << 24;
  for (int i = 0; i < 16; ++i) {
    q[i] = static_cast<uint8_t>((nibbles[i] & 15) + ((bits >> i & 1) << 4) + add);
    q[i + 16] = static_cast<uint8_t>((nibbles[i] >> 4) + ((bits >> (i + 16) & 1) << 4) + add);
  }
}

// Scale and minimum of group i in 12 bytes of 6-bit numbers: those of groups 0 to 3 in the low six
// bits of bytes i and i + 4; of the others the low four bits in byte i + 4, the high two on top of
// those.
void scale_and_minimum(const uint8_t* s, int i, int& scale, int& minimum) {
  if (i < 4) {
    scale = s[i] & 63;
    minimum = s[i + 4] & 63;
  } else {
    scale = (s[i + 4] & 15) | (s[i - 4] >> 6) << 4;
    minimum = (s[i + 4] >> 4) | (s[i] >> 6) << 4;
  }
}

// d * scale and -dmin * minimum, rounded to fp16: the only rounding of any conversion here.
void k_scales(const uint8_t* block, GgmlBlock& out) {
  const float d = to_float(half_at(block)), dmin = to_float(half_at(block + 2));
  for (int g = 0; g < 8; ++g) {
    int scale, minimum;
    scale_and_minimum(block + 4, g, scale, minimum);
    out.d[g] = from_float<f16>(d * static_cast<float>(scale));
    out.m[g] = from_float<f16>(-(dmin * static_cast<float>(minimum)));
  }
}

void unpack_q4_k(const uint8_t* block, GgmlBlock& out) {
  k_scales(block, out);
  const uint8_t* nibbles = block + 16;  // groups 2i and 2i + 1 in the nibbles of 32 bytes
  for (int g = 0; g < 8; ++g) {
    const uint8_t* p = nibbles + g / 2 * 32;
    const int shift = g % 2 * 4;
    for (int i = 0; i < 16; ++i)
      out.q[g * 16 + i] =
          static_cast<uint8_t>((p[i] >> shift & 15) | (p[i + 16] >> shift & 15) << 4);
  }
}

void unpack_q5_k(const uint8_t* block, GgmlBlock& out) {
  k_scales(block, out);
  const uint8_t* high = block + 16;  // bit g of byte i is the fifth bit of weight i of group g
  const uint8_t* nibbles = block + 48;
  for (int g = 0; g < 8; ++g)
    for (int i = 0; i < 32; ++i)
      out.q[g * 32 + i] = static_cast<uint8_t>((nibbles[g / 2 * 32 + i] >> (g % 2 * 4) & 15) |
                                               (high[i] >> g & 1) << 4);
}

void unpack_q6_k(const uint8_t* block, GgmlBlock& out) {
  const uint8_t *low = block, *high = block + 128;
  const int8_t* scales = reinterpret_cast<const int8_t*>(block + 192);
  const float d = to_float(half_at(block + 208));
  for (int g = 0; g < 16; ++g) out.d[g] = from_float<f16>(d * static_cast<float>(scales[g]));
  // Each half of 128 weights: 64 bytes of low nibbles, 32 bytes of two high bits; quarter c of the
  // half takes nibble c / 2 of bytes c % 2 * 32 + i, and bits 2c of byte i.
  for (int half = 0; half < 2; ++half)
    for (int c = 0; c < 4; ++c)
      for (int i = 0; i < 32; ++i) {
        const int q = (low[half * 64 + c % 2 * 32 + i] >> (c / 2 * 4) & 15) |
                      (high[half * 32 + i] >> (2 * c) & 3) << 4;
        out.q[half * 128 + c * 32 + i] = static_cast<uint8_t>(q - 32 + 128);
      }
}

}  // namespace

void unpack(GgmlType type, const uint8_t* block, GgmlBlock& out) {
  switch (type) {
    case GgmlType::Q5_0:
      out.d[0] = half_at(block);
      return unpack_q5(block + 2, block + 6, 128 - 16, out.q);
    case GgmlType::Q5_1:
      out.d[0] = half_at(block);
      out.m[0] = half_at(block + 2);
      return unpack_q5(block + 4, block + 8, 0, out.q);
    case GgmlType::Q4_K: return unpack_q4_k(block, out);
    case GgmlType::Q5_K: return unpack_q5_k(block, out);
    case GgmlType::Q6_K: return unpack_q6_k(block, out);
    default: return;
  }
}

}  // namespace pyllm

// The block formats of GGUF files (ggml's quantized types), one block at a time, as unsigned
// quants with a scale and a minimum per group. Layouts after ggml's ggml-common.h.
#pragma once
#include <cstdint>
#include <string>

#include "core/half.h"

namespace pyllm {

enum class GgmlType { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K };

struct GgmlFormat {
  const char* name;
  int block_size, block_bytes;  // weights and bytes of a block
  int bits, group_size;         // what it becomes in a QuantMatrix
  bool has_minimum;
};
inline constexpr GgmlFormat kGgmlFormats[] = {
    {"Q4_0", 32, 18, 4, 32, false},  {"Q4_1", 32, 20, 4, 32, true},
    {"Q5_0", 32, 22, 8, 32, false},  {"Q5_1", 32, 24, 8, 32, true},
    {"Q8_0", 32, 34, 8, 32, false},  {"Q4_K", 256, 144, 4, 32, true},
    {"Q5_K", 256, 176, 8, 32, true}, {"Q6_K", 256, 210, 8, 16, false},
};
inline const GgmlFormat& format_of(GgmlType type) { return kGgmlFormats[static_cast<int>(type)]; }

// One block: quants of 4-bit formats are packed two to a byte, k in the low and k + group_size / 2
// of the same group in the high nibble.
struct GgmlBlock {
  uint8_t q[256];
  f16 d[16], m[16];
};

// Whether a block is its group as a QuantMatrix has it: fp16 d, m if there is one, then the quants
// (those of 8 bits signed). Nothing of it needs unpacking.
constexpr bool is_plain(GgmlType type) {
  return type == GgmlType::Q4_0 || type == GgmlType::Q4_1 || type == GgmlType::Q8_0;
}

// Reads format_of(type).block_bytes bytes of a type that is not plain.
void unpack(GgmlType type, const uint8_t* block, GgmlBlock& out);

}  // namespace pyllm

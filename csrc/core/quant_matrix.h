// Quantized weights as every CPU kernel reads them, whatever the instruction set.
//
// A weight is d * (q - offset) + m: q unsigned, 4 or 8 bits; d and m fp16, one of each per row and
// group of 16 or 32 consecutive k. Without a minimum m is 0 and offset is half the range of q (8 or
// 128); with one, offset is 0. Rows lie in panels of 16, one row a lane, so that one instruction
// multiplies four k of 16 rows:
//
//   panel [ceil(N / 16)], missing rows all zero
//     group [K / group_size]
//       f16 d[16], then f16 m[16] if there is a minimum
//       8 bit: vector [group_size / 4], 64 bytes each: byte 4 * lane + i is k = 4 * vector + i
//       4 bit: vector [group_size / 8], likewise in the low nibbles; k + group_size / 2 in the high
#pragma once
#include <cstdint>

namespace pyllm {

struct QuantMatrix {
  const uint8_t* data = nullptr;  // aligned to 64 bytes
  int64_t n = 0, k = 0;
  int bits = 4, group_size = 32;
  bool has_minimum = false;

  static constexpr int64_t kPanelRows = 16;

  int offset() const { return has_minimum ? 0 : 1 << (bits - 1); }
  int64_t groups() const { return k / group_size; }
  int64_t panels() const { return (n + kPanelRows - 1) / kPanelRows; }
  int64_t scale_bytes() const { return has_minimum ? 64 : 32; }
  int64_t group_bytes() const { return scale_bytes() + kPanelRows * group_size * bits / 8; }
  int64_t panel_bytes() const { return groups() * group_bytes(); }
  int64_t bytes() const { return panels() * panel_bytes(); }
};

}  // namespace pyllm

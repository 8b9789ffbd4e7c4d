// Quantized weights in the order of tensor-core fragments, as the CUDA kernels read them.
//
// The weight is the A operand (16 x 16) of mma.m16n8k16, so that a tile of activations is 8 rows
// wide and not 16. A cell is 32 rows and 32 k: fragments (i, j) for i, j = 0, 1, of k 16 j to
// 16 j + 15 and of rows 4 g + 2 i (row g of the fragment) and 4 g + 2 i + 1 (row g + 8). So lane
// 4 g + t of the warp, which multiplies the whole cell, has results of rows 4 g to 4 g + 3. It
// holds, as PTX defines, registers r = 0 to 3 with k = 16 j + 2 t + p + 8 (r / 2), p = 0, 1, of the
// fragment's row g + 8 (r % 2).
//
// Cells that share their scales are a span: four, two or one where groups are of 128, 64 or fewer.
//
//   strip [ceil(N / 32)], missing rows all zero
//     span [ceil(K / (32 * cells))], missing k all zero
//       cell [4, 2 or 1]
//         4 bit: lane [32]: fragment (i, j) [4]: a word with r, p at bit 4 r + 16 p
//         8 bit: i [2]: lane [32]: j [2]: r [4]: p [2]: a byte
//       g [8]: group [2 if of 16, or 1]: f16 d[4], then f16 m[4] if there is a minimum
//
// A value is d * (q - offset) + m as in quant_matrix.h. One group a row is stored as groups of 128
// (of K, if that is 32 or 64; of 16, if K is no multiple of 32).
#pragma once
#include "core/quant_matrix.h"

#ifdef __CUDACC__
#define PYLLM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYLLM_HOST_DEVICE inline
#endif

namespace pyllm {

struct QuantFragments {
  int64_t n = 0, k = 0;
  int bits = 4, group_size = 32;
  bool has_minimum = false;

  static constexpr int kRows = 32, kDepth = 32;

  PYLLM_HOST_DEVICE int stored_group_size() const {
    return group_size % 32 ? 16 : group_size > 64 ? 128 : group_size;
  }
  PYLLM_HOST_DEVICE int span_cells() const {
    return stored_group_size() < kDepth ? 1 : stored_group_size() / kDepth;
  }
  PYLLM_HOST_DEVICE int span_groups() const { return stored_group_size() < kDepth ? 2 : 1; }
  PYLLM_HOST_DEVICE int64_t strips() const { return (n + kRows - 1) / kRows; }
  PYLLM_HOST_DEVICE int64_t spans() const {
    const int depth = kDepth * span_cells();
    return (k + depth - 1) / depth;
  }
  PYLLM_HOST_DEVICE int quant_bytes() const { return kRows * kDepth * bits / 8; }  // of a cell
  PYLLM_HOST_DEVICE int scale_bytes() const {
    return 2 * kRows * span_groups() * (has_minimum ? 2 : 1);
  }
  PYLLM_HOST_DEVICE int span_bytes() const { return span_cells() * quant_bytes() + scale_bytes(); }
  PYLLM_HOST_DEVICE int64_t bytes() const { return strips() * spans() * span_bytes(); }
};

// Word `word` of a span of 4 byte words, gathered from the panels of `w`, which may have smaller
// groups that repeat their scales.
PYLLM_HOST_DEVICE uint32_t fragment_word(const QuantMatrix& w, const QuantFragments& f,
                                         int64_t strip, int64_t span, int word) {
  const int cell_words = f.quant_bytes() / 4, quant_words = f.span_cells() * cell_words;
  const int cell = word < quant_words ? word / cell_words : 0;
  const int64_t first_row = strip * f.kRows, first_k = (span * f.span_cells() + cell) * f.kDepth;
  // The group that holds k in the panel of the row; null where there is none.
  const auto group_at = [&](int row, int k) -> const uint8_t* {
    const int64_t panel = (first_row + row) / 16;
    if (panel * 16 >= w.n || first_k + k >= w.k) return nullptr;
    const int64_t scales = w.has_minimum ? 64 : 32;
    const int64_t group_bytes = scales + 2 * w.group_size * w.bits;
    return w.data + (panel * (w.k / w.group_size) + (first_k + k) / w.group_size) * group_bytes;
  };
  uint32_t result = 0;
  if (word >= quant_words) {
    for (int e = 0; e < 2; ++e) {
      const int half = 2 * (word - quant_words) + e, parts = w.has_minimum ? 2 : 1;
      const int row = half / (4 * parts * f.span_groups()) * 4 + half % 4;
      const uint8_t* group = group_at(row, half / (4 * parts) % f.span_groups() * 16);
      if (!group) continue;
      const uint8_t* value = group + half / 4 % parts * 32 + (first_row + row) % 16 * 2;
      result |= (value[0] | static_cast<uint32_t>(value[1]) << 8) << 16 * e;
    }
    return result;
  }
  word %= cell_words;
  // A word of 8 bits has registers 2 h and 2 h + 1 of one fragment.
  const int lane = w.bits == 4 ? word / 4 : word / 4 % 32;
  const int i = w.bits == 4 ? word / 2 % 2 : word / 128, j = w.bits == 4 ? word % 2 : word / 2 % 2;
  const int h = word % 2;
  for (int e = 0; e < 32 / w.bits; ++e) {
    const int p = e % 2, r = e / 2 + (w.bits == 8 ? 2 * h : 0);
    const int row = lane / 4 * 4 + 2 * i + r % 2, k = 16 * j + lane % 4 * 2 + p + r / 2 * 8;
    const uint8_t* group = group_at(row, k);
    if (!group) continue;
    const int within = static_cast<int>((first_k + k) % w.group_size);
    const int low = w.bits == 4 ? within % (w.group_size / 2) : within;
    const uint8_t byte =
        group[(w.has_minimum ? 64 : 32) + low / 4 * 64 + (first_row + row) % 16 * 4 + low % 4];
    if (w.bits == 8)
      result |= static_cast<uint32_t>(byte) << 8 * e;
    else
      result |= static_cast<uint32_t>(within == low ? byte & 15 : byte >> 4) << (4 * r + 16 * p);
  }
  return result;
}

// Writes the fragments `f` of `w`, which has f's groups or smaller ones, to `out` (f.bytes()),
// which may not overlap. Uses all threads; must not be called while capturing.
void pack_fragments(const QuantMatrix& w, const QuantFragments& f, uint8_t* out);

}  // namespace pyllm

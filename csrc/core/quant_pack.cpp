// A panel is packed by one thread: its rows are read in order, a block at a time, and scattered in
// words of four bytes. Nothing is kept but one block.
#include "core/quant_pack.h"

#include <cstring>

#include "core/launch.h"
#include "core/thread_pool.h"

namespace pyllm {
namespace {

struct PackArgs {
  const std::vector<GgmlRows>* sources;
  GgmlType type;
  QuantMatrix matrix;
  uint8_t* out;
  int64_t chunks() const { return matrix.panels(); }
};

const uint8_t* find_row(const PackArgs& a, int64_t row, int64_t row_bytes) {
  for (const GgmlRows& source : *a.sources) {
    if (row < source.rows) return source.data + row * row_bytes;
    row -= source.rows;
  }
  return nullptr;
}

// Words straight from the file; that the compiler knows all sizes is worth a factor.
template <GgmlType kType>
void copy_row(const QuantMatrix& w, const uint8_t* row, uint8_t* panel, int lane) {
  constexpr GgmlFormat f = kGgmlFormats[static_cast<int>(kType)];
  constexpr int scales = f.has_minimum ? 4 : 2, quants = f.group_size * f.bits / 8;
  static_assert(is_plain(kType) && f.block_bytes == scales + quants);
  for (int64_t k = 0; k < w.k; k += f.block_size, row += f.block_bytes) {
    std::memcpy(panel + 2 * lane, row, 2);
    if (f.has_minimum) std::memcpy(panel + 32 + 2 * lane, row + 2, 2);
    for (int i = 0; i < quants; i += 4) {
      uint32_t word;
      std::memcpy(&word, row + scales + i, 4);
      if (f.bits == 8) word ^= 0x80808080u;  // signed in the file
      std::memcpy(panel + 16 * scales + 16 * i + 4 * lane, &word, 4);
    }
    panel += 16 * (scales + quants);
  }
}

void unpack_row(GgmlType type, const QuantMatrix& w, const uint8_t* row, uint8_t* panel, int lane) {
  const GgmlFormat& format = format_of(type);
  const int groups = format.block_size / w.group_size;
  const int row_group_bytes = w.group_size * w.bits / 8;
  GgmlBlock block;
  for (int64_t k = 0; k < w.k; k += format.block_size, row += format.block_bytes) {
    unpack(type, row, block);
    for (int g = 0; g < groups; ++g, panel += w.group_bytes()) {
      std::memcpy(panel + 2 * lane, &block.d[g], 2);
      if (w.has_minimum) std::memcpy(panel + 32 + 2 * lane, &block.m[g], 2);
      const uint8_t* q = block.q + g * row_group_bytes;
      uint8_t* quants = panel + w.scale_bytes() + 4 * lane;
      for (int i = 0; i < row_group_bytes; i += 4) std::memcpy(quants + 16 * i, q + i, 4);
    }
  }
}

void pack_row(const PackArgs& a, const uint8_t* row, uint8_t* panel, int lane) {
  switch (a.type) {
    case GgmlType::Q4_0: return copy_row<GgmlType::Q4_0>(a.matrix, row, panel, lane);
    case GgmlType::Q4_1: return copy_row<GgmlType::Q4_1>(a.matrix, row, panel, lane);
    case GgmlType::Q8_0: return copy_row<GgmlType::Q8_0>(a.matrix, row, panel, lane);
    default: return unpack_row(a.type, a.matrix, row, panel, lane);
  }
}

void pack_panel(const PackArgs& a, int64_t panel_index) {
  const QuantMatrix& w = a.matrix;
  const GgmlFormat& format = format_of(a.type);
  const int64_t row_bytes = w.k / format.block_size * format.block_bytes;
  const int64_t first = panel_index * QuantMatrix::kPanelRows;
  uint8_t* panel = a.out + panel_index * w.panel_bytes();
  if (first + QuantMatrix::kPanelRows > w.n) std::memset(panel, 0, w.panel_bytes());
  for (int lane = 0; lane < QuantMatrix::kPanelRows && first + lane < w.n; ++lane)
    pack_row(a, find_row(a, first + lane, row_bytes), panel, lane);
}

}  // namespace

void pack_ggml(const std::vector<GgmlRows>& sources, GgmlType type, const QuantMatrix& matrix,
               uint8_t* out) {
  const Launch launch = make_launch("pack_ggml", &pack_panel, {&sources, type, matrix, out});
  ThreadPool::get().run(&launch, 1);
}

}  // namespace pyllm

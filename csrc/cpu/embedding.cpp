// The floor is bytes over bandwidth: one row read and one written a token. The rows of a panel of
// quantized weights lie interleaved, so reading one touches the cache lines of all sixteen: a few
// KB a token, nothing beside the layers that follow.
#include "cpu/embedding.h"

#include <type_traits>

#include "cpu/simd.h"

namespace pyllm::PYLLM_ISA {
namespace {

template <class Y, class W>
void copy_row(const W* row, int64_t d, Y* y) {
  for (int64_t i = 0; i < d; i += kLanes) store_n(y + i, load_n(row + i, d - i), d - i);
}

template <class Y>
void dequantize_row(const QuantMatrix& w, int64_t row, Y* y) {
  const int64_t lane = row % QuantMatrix::kPanelRows;
  const uint8_t* group = w.data + row / QuantMatrix::kPanelRows * w.panel_bytes();
  const int nibbles = w.bits == 4 ? 2 : 1, mask = w.bits == 4 ? 15 : 255;
  const int span = w.group_size / nibbles;  // weights in the low (or only) part of the bytes
  for (int64_t g = 0; g < w.groups(); ++g, group += w.group_bytes()) {
    f16 d, m = {0};
    std::memcpy(&d, group + 2 * lane, 2);
    if (w.has_minimum) std::memcpy(&m, group + 32 + 2 * lane, 2);
    const float scale = to_float(d), minimum = to_float(m);
    const uint8_t* quants = group + w.scale_bytes() + 4 * lane;
    for (int part = 0; part < nibbles; ++part)
      for (int i = 0; i < span; ++i, ++y) {
        const int q = (quants[i / 4 * 64 + i % 4] >> (4 * part) & mask) - w.offset();
        const float value = scale * static_cast<float>(q);
        *y = from_float<Y>(w.has_minimum ? value + minimum : value);
      }
  }
}

template <class Y>
void write_row(const EmbeddingArgs& a, int64_t t) {
  const int64_t id = a.ids.as<int32_t>()[t], d = a.y.shape[1];
  Y* y = a.y.row<Y>(t);
  if (id < 0 || id >= (a.weight.defined() ? a.weight.shape[0] : a.quantized.n)) {
    const Y nan = from_float<Y>(std::numeric_limits<float>::quiet_NaN());
    for (int64_t i = 0; i < d; ++i) y[i] = nan;
  } else if (a.weight.defined()) {
    dispatch_float(a.weight.dtype, [&](auto* w) {
      copy_row(a.weight.row<std::remove_pointer_t<decltype(w)>>(id), d, y);
    });
  } else {
    dequantize_row(a.quantized, id, y);
  }
}

}  // namespace

void embedding(const EmbeddingArgs& a, int64_t chunk) {
  const int64_t begin = chunk * a.tokens_per_chunk;
  const int64_t end = smaller(begin + a.tokens_per_chunk, a.ids.shape[0]);
  dispatch_float(a.y.dtype, [&](auto* y) {
    for (int64_t t = begin; t < end; ++t) write_row<std::remove_pointer_t<decltype(y)>>(a, t);
  });
}

}  // namespace pyllm::PYLLM_ISA

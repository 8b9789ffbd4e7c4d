// Reads q, k and v once and writes them once, so the floor is bytes over bandwidth; a decoding step
// has so few that the launch itself is what it costs.
#include "cpu/rope_cache.h"

#include "cpu/attention.h"
#include "cpu/simd.h"

namespace pyllm::PYLLM_ISA {
namespace {

// y = x rotated by the angles of one position, in float32 and without fused multiply-adds: the
// roundings of the formula as PyTorch evaluates it. Both of a pair are read before either is
// written, so y may be x.
template <class X, class Y>
void rotate(const X* x, Y* y, const float* cosine, const float* sine, int64_t half, int64_t width,
            bool interleaved) {
  if (interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
      y[2 * i] = from_float<Y>(a * cosine[i] - b * sine[i]);
      y[2 * i + 1] = from_float<Y>(b * cosine[i] + a * sine[i]);
    }
  } else {
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t n = half - i;
      const f32x16 a = load_n(x + i, n), b = load_n(x + half + i, n);
      const f32x16 c = load_n(cosine + i, n), s = load_n(sine + i, n);
      store_n(y + i, a * c - b * s, n);
      store_n(y + half + i, b * c + a * s, n);
    }
  }
  for (int64_t i = 2 * half; i < width; i += kLanes)
    store_n(y + i, load_n(x + i, width - i), width - i);
}

// Where the cache holds position `position` of the sequence that owns `token`: an offset of pages
// and slots, or page -1 if there is none.
struct Slot {
  int64_t page, index;
};
PYLLM_INLINE Slot find_slot(const RopeCacheArgs& a, int64_t token, int64_t position) {
  int64_t b = 0;
  while (b < a.batch && a.cu_seqlens_q[b + 1] <= token) ++b;
  const int64_t page_size = a.k_cache.shape[1];
  if (b == a.batch || position < 0 || position / page_size >= a.max_pages) return {-1, 0};
  const int64_t page = a.page_table[b * a.page_table_stride + position / page_size];
  if (page < 0 || page >= a.k_cache.shape[0]) return {-1, 0};
  return {page, position % page_size};
}

template <class X, class C>
void rope_token(const RopeCacheArgs& a, int64_t token) {
  const int64_t half = a.cos_sin.shape[1] / 2, width = a.q.shape[2];
  const int64_t position = a.positions[token];
  const int64_t angle = smaller(larger(position, 0), a.cos_sin.shape[0] - 1);
  const float *cosine = a.cos_sin.row<float>(angle), *sine = cosine + half;
  for (int64_t h = 0; h < a.q.shape[1]; ++h)
    rotate(a.q.row<X>(token, h), a.q_out.row<X>(token, h), cosine, sine, half, width,
           a.interleaved);
  const Slot slot = find_slot(a, token, position);
  if (slot.page < 0) return;
  for (int64_t h = 0; h < a.k.shape[1]; ++h) {
    C* k_out = a.k_cache.row<C>(slot.page, slot.index) + h * a.k_cache.stride[2];
    C* v_out = a.v_cache.row<C>(slot.page, slot.index) + h * a.v_cache.stride[2];
    if (const int64_t stride = a.k_cache.stride[3]; stride == 1) {
      rotate(a.k.row<X>(token, h), k_out, cosine, sine, half, width, a.interleaved);
    } else {
      C rotated[kMaxHeadDim];
      rotate(a.k.row<X>(token, h), rotated, cosine, sine, half, width, a.interleaved);
      for (int64_t i = 0; i < width; ++i) k_out[i * stride] = rotated[i];
    }
    rotate(a.v.row<X>(token, h), v_out, cosine, sine, 0, width, false);
  }
}

}  // namespace

void rope_cache(const RopeCacheArgs& a, int64_t chunk) {
  const int64_t begin = chunk * a.tokens_per_chunk;
  const int64_t end = smaller(begin + a.tokens_per_chunk, a.q.shape[0]);
  dispatch_float(a.q.dtype, [&](auto* x) {
    dispatch_float(a.k_cache.dtype, [&](auto* c) {
      using X = std::remove_pointer_t<decltype(x)>;
      using C = std::remove_pointer_t<decltype(c)>;
      for (int64_t token = begin; token < end; ++token) rope_token<X, C>(a, token);
    });
  });
}

}  // namespace pyllm::PYLLM_ISA

// The keys and values of paged_attention: where they are in the caches, and how they come to a
// tile.
#pragma once
#include "cuda/attention_batch.cuh"
#include "cuda/paged_attention.h"

namespace pyllm::cuda {

// The sequence of a batch and what its queries see.
struct Sequence {
  Piece queries;
  View view;
  const int32_t* pages;

  __device__ __forceinline__ Sequence(const PagedAttentionArgs& a, int b, int group)
      : queries(a.cu_seqlens_q, b, static_cast<int>(a.q.shape[0])),
        pages(static_cast<const int32_t*>(a.page_table.data) + b * a.page_table.stride[0]) {
    const int64_t room = a.k.shape[0] == 0 ? 0 : a.page_table.shape[1] * a.k.shape[1];
    const int keys = static_cast<int>(min(static_cast<int64_t>(max(a.context_lens[b], 0)), room));
    view = {queries.length * group, group, keys - queries.length, keys, a.left, 0};
  }
};

// A cache, as seen from one KV head. Rows begin on multiples of 16 bytes, which offsets count.
struct Cache {
  const char* data;
  unsigned page_stride, row_stride;

  __device__ __forceinline__ Cache(const Tensor& t, int head) {
    const int item = t.dtype == DType::I8 || t.dtype == DType::E4M3 ? 1 : 2;
    data = static_cast<const char*>(t.data) + head * t.stride[2] * item;
    page_stride = static_cast<unsigned>(t.stride[0] * item / 16);
    row_stride = static_cast<unsigned>(t.stride[1] * item / 16);
  }
  __device__ __forceinline__ unsigned offset(int page, int row) const {
    return page * page_stride + row * row_stride;
  }
};

// The page of a key, and its row there. Pages outside of the cache become its last.
__device__ __forceinline__ int page_of(const PagedAttentionArgs& a, const int32_t* pages, int key) {
  return static_cast<int>(
      min(static_cast<unsigned>(pages[key / static_cast<unsigned>(a.k.shape[1])]),
          static_cast<unsigned>(a.k.shape[0]) - 1));
}
__device__ __forceinline__ int row_of(const PagedAttentionArgs& a, int key) {
  return static_cast<int>(key % static_cast<unsigned>(a.k.shape[1]));
}

// Eight bytes of an int8 or float8 cache as T, exactly.
template <class T>
__device__ __forceinline__ Vec<uint32_t, 4> widen(Vec<uint32_t, 2> bytes, bool float8) {
  Vec<uint32_t, 4> pairs;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = bytes[i / 2];
    if (float8) {
      pairs[i] = widen_e4m3(word >> i % 2 * 16 & 0xffffu);
      if constexpr (std::is_same_v<T, bf16>) {
        const auto x = unpack<f16>(pairs[i]);
        pairs[i] = pack<bf16>(x[0], x[1]);
      }
    } else if constexpr (std::is_same_v<T, f16>) {
      // As unsigned bytes in the low bits of 1024, whose unit in the last place is 1.
      pairs[i] = sub2_f16(__byte_perm(word ^ 0x80808080u, 0x64646464u, i % 2 ? 0x4342 : 0x4140),
                          0x64806480u);
    } else {
      const auto number = [&](int byte) {  // the same with 2^23
        return __uint_as_float(__byte_perm(word ^ 0x80808080u, 0x4b000000u, 0x7650 + byte)) -
               8388736.0f;
      };
      pairs[i] = pack<bf16>(number(i % 2 * 2), number(i % 2 * 2 + 1));
    }
  }
  return pairs;
}

// The keys and values of a sequence in the caches, of S::T or with Bytes of 8 bits, which are
// widened on the way from the shared memory they land in to the tile.
template <class S, bool Bytes>
struct Paged {
  using T = typename S::T;
  static constexpr int kLookups = S::kKeys / 32;  // keys of a block a lane looks up
  static constexpr int kChunks = Bytes ? S::kDim / 16 : S::kDim / 8;
  static constexpr int kBytes = S::kKeyElements * 4;  // two tiles; or two of bytes and one

  const PagedAttentionArgs& a;
  const Sequence& sequence;
  Cache k, v;
  char* shared;
  bool dropped = false;  // infinities or NaN among values were left out
  int page[kLookups], next_page[kLookups];

  __device__ __forceinline__ Paged(const PagedAttentionArgs& a, const Sequence& sequence, int head,
                                   char* shared)
      : a(a), sequence(sequence), k(a.k, head), v(a.v, head), shared(shared) {}

  __device__ __forceinline__ T* tile(bool of_values) const {
    return reinterpret_cast<T*>(shared + (Bytes || of_values ? S::kKeyElements * 2 : 0));
  }
  __device__ __forceinline__ char* landing(bool of_values) const {
    return shared + (of_values ? S::kKeyElements * (Bytes ? 1 : 2) : 0);
  }
  __device__ __forceinline__ void look_up(int key) {
#pragma unroll
    for (int i = 0; i < kLookups; ++i) {
      const int at = key + i * 32 + lane_id();
      next_page[i] = at < sequence.view.keys ? page_of(a, sequence.pages, at) : 0;
    }
  }
  __device__ __forceinline__ void copy(const Cache& cache, bool of_values, int key) {
    unsigned offsets[kLookups];
#pragma unroll
    for (int i = 0; i < kLookups; ++i)
      offsets[i] = cache.offset(page[i], row_of(a, key + i * 32 + lane_id()));
    const int dim = static_cast<int>(a.q.shape[2]);
    char* const to = landing(of_values);
    for_own_chunks<S::kThreads, S::kKeys, kChunks>([&](int r, int chunk) {
      // The rows of a warp are in the same 32.
      const unsigned own = kLookups == 1 || r < 32 ? offsets[0] : offsets[kLookups - 1];
      const unsigned offset = __shfl_sync(0xffffffffu, own, r % 32);
      const bool real = key + r < sequence.view.keys && chunk * (Bytes ? 16 : 8) < dim;
      const int at = Bytes ? (r * kChunks + chunk) * 16 : swizzled<S::kDim>(r, chunk) * 2;
      cp_async<16>(to + at, cache.data + (real ? (int64_t{offset} + chunk) * 16 : 0),
                   real ? 16 : 0);
    });
  }
  __device__ __forceinline__ void copy_keys(int key) {
#pragma unroll
    for (int i = 0; i < kLookups; ++i) page[i] = next_page[i];
    copy(k, false, key);
  }
  __device__ __forceinline__ void copy_values(int key) {
    copy(v, true, key);
    look_up(key + S::kKeys);  // the table answers while q k is computed
  }
  __device__ __forceinline__ void widen_tile(bool of_values, bool partly) {
    const bool float8 = a.k.dtype == DType::E4M3;
    for_own_chunks<S::kThreads, S::kKeys, S::kChunks>([&](int r, int chunk) {
      const auto raw = load<Vec<uint32_t, 2>>(landing(of_values) + r * S::kDim + chunk * 8);
      store(tile(of_values) + swizzled<S::kDim>(r, chunk), widen<T>(raw, float8));
    });
    if (partly && float8) dropped |= drop_non_finite<S>(tile(of_values));
    __syncthreads();
  }
  __device__ __forceinline__ const T* keys() {
    if constexpr (Bytes) widen_tile(false, false);
    return tile(false);
  }
  __device__ __forceinline__ void values_landed(bool partly) {
    if (!Bytes && partly) dropped |= drop_non_finite<S>(tile(true));
  }
  __device__ __forceinline__ const T* values(bool partly) {
    if constexpr (Bytes) widen_tile(true, partly);
    return tile(true);
  }
};

}  // namespace pyllm::cuda

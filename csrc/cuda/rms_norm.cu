// One pass over memory: a block holds its row in registers, K vectors of 16 bytes a thread, while
// the squares are summed. The floor is bytes over bandwidth: (1 read + 1 write) * D * itemsize a
// row, twice that with a residual. Rows that 16-byte vectors do not fit are read twice, one value
// at a time.
#include "cuda/dispatch.cuh"
#include "cuda/primitives.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rms_norm.h"

namespace pyllm::cuda {
namespace {

constexpr int kMaxThreads = 1024;

struct Rows {  // the tensors as the kernel needs them: a row is (block / heads, block % heads)
  const void *x, *residual, *weight;
  void *y, *residual_out;
  int64_t x_stride[2], residual_stride[2], y_stride[2], residual_out_stride[2];
  int heads, width;
  float eps;
};

template <class T>
__device__ T* row(void* base, const int64_t (&stride)[2], int heads) {
  const int64_t r = blockIdx.x;
  return static_cast<T*>(base) + r / heads * stride[0] + r % heads * stride[1];
}
template <class T>
__device__ const T* row(const void* base, const int64_t (&stride)[2], int heads) {
  return row<T>(const_cast<void*>(base), stride, heads);
}

// T: of the rows; W: of the weight; N: values a vector; K: vectors a thread holds, 0 for a row of
// any width that is read twice.
template <class T, class W, int N, int K>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_kernel(Rows p) {
  using V = Vec<T, N>;
  const T* x = row<T>(p.x, p.x_stride, p.heads);
  const T* residual = p.residual ? row<T>(p.residual, p.residual_stride, p.heads) : nullptr;
  T* sum_out = p.residual ? row<T>(p.residual_out, p.residual_out_stride, p.heads) : nullptr;
  const W* weight = static_cast<const W*>(p.weight);
  T* y = row<T>(p.y, p.y_stride, p.heads);
  const int step = blockDim.x * N, first = threadIdx.x * N;

  V held[K > 0 ? K : 1];
  float squares = 0.0f;
  // What is normalized is what is stored: the sum rounded to T.
  auto take = [&](V& v, int at) {
    v = load_once<V>(x + at);
    if (residual) {
      const V r = load_once<V>(residual + at);
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = round_to<T>(float_of(v[i]) + float_of(r[i]));
      store(sum_out + at, v);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) squares = fmaf(float_of(v[i]), float_of(v[i]), squares);
  };
  auto give = [&](const V& v, int at, float scale) {
    const auto w = load<Vec<W, N>>(weight + at);
    V out;
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = round_to<T>(float_of(v[i]) * scale * float_of(w[i]));
    store(y + at, out);
  };

  if constexpr (K > 0) {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (first + k * step < p.width) take(held[k], first + k * step);
  } else {
    for (int at = first; at < p.width; at += step) take(held[0], at);
  }
  const float scale = rsqrtf(block_sum(squares) / p.width + p.eps);
  if constexpr (K > 0) {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (first + k * step < p.width) give(held[k], first + k * step, scale);
  } else {
    // Each thread reads back what it wrote itself.
    const T* source = residual ? sum_out : x;
    for (int at = first; at < p.width; at += step) give(load<V>(source + at), at, scale);
  }
}

template <class T, class W, int N, int K>
Status launch_rows(const Rows& rows, int64_t count, Stream stream) {
  const int vectors = (rows.width + N - 1) / N;
  const int per_thread = K > 0 ? K : 4;
  int threads = (vectors + per_thread - 1) / per_thread;
  threads = threads >= kMaxThreads ? kMaxThreads : (threads + 31) / 32 * 32;
  return launch("rms_norm", rms_norm_kernel<T, W, N, K>, dim3(static_cast<unsigned>(count)),
                dim3(threads), 0, stream, rows);
}

}  // namespace

Status rms_norm(const RmsNormArgs& a, Stream stream) {
  Rows rows{};
  rows.x = a.x.data, rows.residual = a.residual.data, rows.weight = a.weight.data;
  rows.y = a.y.data, rows.residual_out = a.residual_out.data;
  for (int i = 0; i < 2; ++i) {
    rows.x_stride[i] = a.x.stride[i], rows.residual_stride[i] = a.residual.stride[i];
    rows.y_stride[i] = a.y.stride[i], rows.residual_out_stride[i] = a.residual_out.stride[i];
  }
  rows.heads = static_cast<int>(a.x.shape[1]);
  rows.width = static_cast<int>(a.x.shape[2]);
  rows.eps = a.eps;
  const int64_t count = a.x.shape[0] * a.x.shape[1];
  return dispatch_float(a.x.dtype, [&](auto t) {
    return dispatch_float(a.weight.dtype, [&](auto w) {
      using T = decltype(t);
      using W = decltype(w);
      constexpr int N = 16 / sizeof(T);
      const bool vectors = rows.width % N == 0 && aligned<N>(a.x) && aligned<N>(a.residual) &&
                           aligned<N>(a.y) && aligned<N>(a.residual_out) && aligned<N>(a.weight);
      if (!vectors || rows.width > 8 * N * kMaxThreads)
        return launch_rows<T, W, 1, 0>(rows, count, stream);
      if (rows.width <= N * kMaxThreads / 4) return launch_rows<T, W, N, 1>(rows, count, stream);
      if (rows.width <= 4 * N * kMaxThreads) return launch_rows<T, W, N, 4>(rows, count, stream);
      return launch_rows<T, W, N, 8>(rows, count, stream);
    });
  });
}

}  // namespace pyllm::cuda

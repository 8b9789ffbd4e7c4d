// The forward kernel of rms_norm and layer_norm.
//
// Floor, per row of D columns: D * itemsize read and written (or D bytes written when quantized),
// and as much again with a residual; the parameters come from L1. On an H100 (3.35 TB/s) 8192 rows
// of 4096 bfloat16 are 134 MB: 40 us, and 45 us at the 90 % we expect; 80 and 89 us with a
// residual. Up to about 8 MB (8192 rows of 256) a launch's own 3 to 4 us are all there is.
// Predicted, not measured.
//
// - One pass: a row stays in registers (K vectors of 16 bytes a thread) while it is reduced.
// LayerNorm
//   sums squares of differences to the mean from there, which E[x^2] - E[x]^2 would cancel.
// - K = 1 up to 2048 columns of 16 bits, so that a warp has many rows in flight (narrow rows share
//   warps: 64 columns are 8 lanes); 4 up to 32,768, which keeps blocks small and their barriers
//   cheap; 16 up to 65,536, by 512 threads of 128 registers (1024 of 64 spill). float32 beyond
//   32,768 goes to shared memory, 128 KB at 65,536; where there is too little it is read again,
//   from L2 for the most part: the multiprocessors have one such row of 256 KB each, together 34
//   MB.
// - forget() keeps values unpacked from 16 bits from staying in registers from pass to pass.
// - A cluster could hold wider rows in distributed shared memory, on Hopper only: not worth it.
// - Parameters are not kept in registers over several rows: it would cost the row's own.
// - A quantized row is scaled by its own largest value, which costs a third reduction and the
//   multiplications a second time, and no traffic. The values before rounding to T are quantized.
#pragma once
#include "cuda/norm_row.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kWide = 16;  // vectors a thread, the most there are

constexpr int most_threads(int k) {
  return k == 1 ? kMaxThreads / 4 : k == kWide ? kWideThreads : kMaxThreads;
}

struct ForwardRows {
  Rows x, residual, y, residual_out;
  const void *weight, *bias;
  float* scale;  // of quantized rows
  int64_t rows;
  unsigned heads;
  int width;
  bool vectors, e4m3;
  bool tail_in_shared;
  float eps;
};

// N quantized values as one store.
template <int N>
__device__ __forceinline__ Vec<uint8_t, N> quantize(const float (&y)[N], float inverse, bool e4m3) {
  Vec<uint8_t, N> q;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    uint32_t four = 0;
    if (e4m3) {
      four = pack_e4m3(y[i] * inverse, y[i + 1] * inverse, y[i + 2] * inverse, y[i + 3] * inverse);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        four |= static_cast<uint32_t>(__float2int_rn(y[i + j] * inverse) & 0xff) << 8 * j;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) q[i + j] = static_cast<uint8_t>(four >> 8 * j);
  }
  return q;
}

template <class T, class W, bool Centered, bool Quantized, int K>
__global__ void __launch_bounds__(most_threads(K)) norm_kernel(ForwardRows p) {
  constexpr int N = kVector<T>;
  using V = Vec<T, N>;
  const int64_t r = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const unsigned row = static_cast<unsigned>(r < p.rows ? r : 0);
  const int width = r < p.rows ? p.width : 0;  // threads without a row only come to the reductions
  const int first = threadIdx.x * N, step = blockDim.x * N;
  const T* x = p.x.at<const T>(row, p.heads);
  const T* residual = p.residual.data ? p.residual.at<const T>(row, p.heads) : nullptr;
  T* total = residual ? p.residual_out.at<T>(row, p.heads) : nullptr;

  V held[K];
  // What the registers do not hold: the vector of column `at` is at shared + at, or read again.
  T* const shared = dynamic_shared<T>() - K * step;
  const T* const again = residual ? total : x;
  // Calls f(vector, column) for what the thread holds.
  auto each = [&](auto f) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if constexpr (sizeof(T) < 4) forget(held[k]);
      if (first + k * step < width) f(held[k], first + k * step);
    }
    if constexpr (K == kWide)
      for (int at = first + K * step; at < width; at += step)
        f(p.tail_in_shared ? load<V>(shared + at)
                           : load_columns<T, N, false>(again, at, width, p.vectors),
          at);
  };
  // What is normalized is what is stored: the sum rounded to T.
  auto add = [&](V& v, int at) {
    const V other = load_columns<T, N>(residual, at, width, p.vectors);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = round_to<T>(float_of(v[i]) + float_of(other[i]));
    store_columns<T, N>(total, v, at, width, p.vectors);
  };
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (first + k * step < width)
      held[k] = load_columns<T, N>(x, first + k * step, width, p.vectors);
  if (residual)
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (first + k * step < width) add(held[k], first + k * step);
  if constexpr (K == kWide)
    for (int at = first + K * step; at < width; at += step) {
      V v = load_columns<T, N>(x, at, width, p.vectors);
      if (residual) add(v, at);
      if (p.tail_in_shared) store(shared + at, v);
    }

  int turn = 0;
  float mean = 0.0f, sum[1] = {};
  if constexpr (Centered) {
    each([&](const V& v, int) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum[0] += float_of(v[i]);
    });
    row_reduce(sum, Sum(), turn);
    mean = sum[0] / p.width;
    sum[0] = 0.0f;
  }
  each([&](const V& v, int at) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float d = float_of(v[i]) - mean;
      if (!Centered || at + i < width) sum[0] = fmaf(d, d, sum[0]);
    }
  });
  row_reduce(sum, Sum(), turn);
  const float scale = rsqrtf(sum[0] / p.width + p.eps);
  auto normalized = [&](float (&y)[N], const V& v, int at) {
    float w[N], b[N];
    if (p.weight) load_parameter<W>(w, p.weight, at, width, p.vectors);
    if (Centered && p.bias) load_parameter<W>(b, p.bias, at, width, p.vectors);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      y[i] = (float_of(v[i]) - mean) * scale;
      if (p.weight) y[i] *= w[i];
      if (Centered && p.bias) y[i] += b[i];
    }
  };

  if constexpr (Quantized) {
    float top[1] = {};
    each([&](const V& v, int at) {
      float y[N];
      normalized(y, v, at);
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (at + i < width) top[0] = Max()(top[0], fabsf(y[i]));
    });
    row_reduce(top, Max(), turn);
    // As quantize_activation has it: rows with no value above 1e-30 are zero, and one that is not
    // finite has a scale of NaN, which makes every product with it NaN.
    const float limit = p.e4m3 ? 448.0f : 127.0f;
    const bool finite = top[0] < __uint_as_float(0x7f800000u), tiny = !(top[0] > 1e-30f);
    if (threadIdx.x == 0 && width)
      p.scale[row] = !finite ? __uint_as_float(0x7fc00000u) : tiny ? 0.0f : top[0] / limit;
    const float inverse = limit / top[0];
    each([&](const V& v, int at) {
      float y[N];
      normalized(y, v, at);
      Vec<uint8_t, N> q{};
      if (finite && !tiny) q = quantize(y, inverse, p.e4m3);
      store_columns<uint8_t, N>(p.y.at<uint8_t>(row, p.heads), q, at, width, p.vectors);
    });
  } else {
    T* out = p.y.at<T>(row, p.heads);
    each([&](const V& v, int at) {
      float y[N];
      normalized(y, v, at);
      V rounded;
#pragma unroll
      for (int i = 0; i < N; ++i) rounded[i] = round_to<T>(y[i]);
      store_columns<T, N>(out, rounded, at, width, p.vectors);
    });
  }
}

template <class T, class W, bool Centered, bool Quantized, int K>
Status launch_forward(const char* name, ForwardRows p, Stream stream) {
  constexpr int N = kVector<T>;
  const dim3 block = row_threads((p.width + N - 1) / N, K, most_threads(K), K == 1 ? 128 : 1);
  const int64_t step = int64_t{block.x} * N, held = K * step;
  const int64_t rest = p.width > held ? (p.width - held + step - 1) / step * step : 0;
  const int64_t shared_bytes = rest * static_cast<int64_t>(sizeof(T));
  p.tail_in_shared = rest > 0 && shared_bytes <= max_shared_bytes();
  const auto blocks = static_cast<unsigned>((p.rows + block.y - 1) / block.y);
  return launch(name, norm_kernel<T, W, Centered, Quantized, K>, dim3(blocks), block,
                p.tail_in_shared ? static_cast<size_t>(shared_bytes) : 0, stream, p);
}

template <bool Centered>
Status norm_forward(const char* name, const NormArgs& a, Stream stream) {
  ForwardRows p{};
  p.x = rows_of(a.x), p.residual = rows_of(a.residual), p.y = rows_of(a.y);
  p.residual_out = rows_of(a.residual_out);
  p.weight = a.weight.data, p.bias = a.bias.data;
  p.scale = a.scale.as<float>();
  p.rows = a.x.shape[0] * a.x.shape[1];
  p.heads = static_cast<unsigned>(a.x.shape[1]);
  p.width = static_cast<int>(a.x.shape[2]);
  p.eps = a.eps;
  p.e4m3 = a.y.dtype == DType::U8;
  const DType parameters = a.weight.data ? a.weight.dtype : a.bias.data ? a.bias.dtype : DType::F32;
  return dispatch_float(a.x.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int N = kVector<T>;
    p.vectors = p.width % N == 0 && aligned<N>(a.x) && aligned<N>(a.residual) && aligned<N>(a.y) &&
                aligned<N>(a.residual_out) && aligned<N>(a.weight) && aligned<N>(a.bias);
    auto with_parameters = [&](auto w) {
      using W = decltype(w);
      auto held = [&](auto k) {
        constexpr int K = decltype(k)::value;
        return a.scale.data ? launch_forward<T, W, Centered, true, K>(name, p, stream)
                            : launch_forward<T, W, Centered, false, K>(name, p, stream);
      };
      if (p.width <= N * most_threads(1)) return held(std::integral_constant<int, 1>());
      if (p.width <= N * 4 * most_threads(4)) return held(std::integral_constant<int, 4>());
      return held(std::integral_constant<int, kWide>());
    };
    return parameters == DType::F32 ? with_parameters(float{}) : with_parameters(T{});
  });
}

}  // namespace
}  // namespace pyllm::cuda

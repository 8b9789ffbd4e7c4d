// The backward kernels of rms_norm and layer_norm. With h = (x - mean) / deviation (RMSNorm: x /
// root mean square) and g = dy * weight:
//   dx = (g - mean(g) - h * mean(g * h)) / deviation + residual_grad, RMSNorm without mean(g);
//   dweight = sum of dy * h over the rows, dbias = sum of dy.
// Nothing is saved by the forward pass: mean and deviation are found again while the row is held.
//
// Floor, per row of D columns: x and dy read, dx written, 3 * D * itemsize (4 with residual_grad).
// On an H100 8192 rows of 4096 bfloat16 are 201 MB: 60 us, 67 us at the 90 % we expect, plus 4 %
// for the partial sums and 4 us for the second launch. Predicted, not measured.
//
// - Up to 8192 columns x, dy and the sums of the parameters' gradients are in registers, eight
//   columns a thread: one pass. Blocks of about 512 threads take rows in turn, 256 blocks at most,
//   so that all are resident; each writes its sums, and a second kernel adds them in order.
// - Wider rows: the sums fit no register file together with the row. One kernel holds x and dy (up
//   to 16,384 columns of 16 bits, the rest is read again) and writes dx and the rows' statistics, a
//   second reads x and dy again by columns: 5/3 of the floor.
#pragma once
#include "cuda/norm_row.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kWideVectors = 4;  // of x and of dy, a thread

struct BackwardRows {
  Rows dy, x, residual_grad, dx;
  Parameter weight;
  float* parts[2];    // dweight, dbias: [parts, padded]
  float* statistics;  // of wide rows: mean, 1 / deviation
  int64_t rows;
  unsigned heads;
  int width, padded, n_parts;
  bool vectors;
  float eps;
};

template <int N>
__device__ __forceinline__ void load_weight(float (&w)[N], const BackwardRows& p, int at) {
  if (!p.weight.data) {
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] = 1.0f;
  } else if (p.weight.dtype == DType::F32) {
    load_parameter<float>(w, p.weight.data, at, p.width, p.vectors);
  } else if (p.weight.dtype == DType::F16) {
    load_parameter<f16>(w, p.weight.data, at, p.width, p.vectors);
  } else {
    load_parameter<bf16>(w, p.weight.data, at, p.width, p.vectors);
  }
}

// A row's sums in the order in which they are found. `each(f)` calls f(x, dy * weight, column) for
// what the thread holds.
struct Statistics {
  float mean = 0.0f, scale, g = 0.0f, gh;  // scale = 1 / deviation; the means of g and g * h

  template <bool Centered, class Each>
  __device__ __forceinline__ void reduce(Each each, int width, float eps, int& turn) {
    if constexpr (Centered) {
      float sum[2] = {};
      each([&](float x, float g, int) { sum[0] += x, sum[1] += g; });
      row_reduce(sum, Sum(), turn);
      mean = sum[0] / width, g = sum[1] / width;
    }
    float sum[2] = {};
    each([&](float x, float g, int at) {
      const float d = x - mean;
      if (!Centered || at < width) sum[0] = fmaf(d, d, sum[0]), sum[1] = fmaf(d, g, sum[1]);
    });
    row_reduce(sum, Sum(), turn);
    scale = rsqrtf(sum[0] / width + eps);
    gh = sum[1] / width * scale;
  }
  __device__ __forceinline__ float normalized(float x) const { return (x - mean) * scale; }
  __device__ __forceinline__ float dx(float x, float dy_weight) const {
    return (dy_weight - g - normalized(x) * gh) * scale;
  }
};

template <class T, int N>
__device__ __forceinline__ void write_dx(const BackwardRows& p, unsigned row, int at,
                                         float (&dx)[N]) {
  if (p.residual_grad.data) {
    const auto r =
        load_columns<T, N>(p.residual_grad.at<const T>(row, p.heads), at, p.width, p.vectors);
#pragma unroll
    for (int i = 0; i < N; ++i) dx[i] += float_of(r[i]);
  }
  Vec<T, N> rounded;
#pragma unroll
  for (int i = 0; i < N; ++i) rounded[i] = round_to<T>(dx[i]);
  store_columns<T, N>(p.dx.at<T>(row, p.heads), rounded, at, p.width, p.vectors);
}

// Adds up what the rows of a block have in each column, in order, and writes it to the block's
// part; by way of shared memory, also so that neighbors write 16 bytes side by side.
template <int N, int K>
__device__ __forceinline__ void write_part(const BackwardRows& p, float* part, float (&sum)[K][N]) {
  auto* all = dynamic_shared<float>();  // [rows, columns]
  const int step = blockDim.x * N, columns = K * step;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int i = 0; i < N; i += 4)
      store(all + threadIdx.y * columns + threadIdx.x * N + k * step + i,
            Vec<float, 4>{sum[k][i], sum[k][i + 1], sum[k][i + 2], sum[k][i + 3]});
  __syncthreads();
  for (int at = 4 * thread; at < p.padded; at += 4 * threads) {
    auto v = load<Vec<float, 4>>(all + at);
    for (unsigned y = 1; y < blockDim.y; ++y) {
      const auto other = load<Vec<float, 4>>(all + y * columns + at);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] += other[j];
    }
    store(part + int64_t{blockIdx.x} * p.padded + at, v);
  }
}

template <class T, bool Centered>
__global__ void __launch_bounds__(kMaxThreads) norm_backward_kernel(BackwardRows p) {
  constexpr int N = kVector<T>, K = 8 / N;
  const int first = threadIdx.x * N, step = blockDim.x * N;
  float w[K][N], dweight[K][N] = {}, dbias[K][N] = {};
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (first + k * step < p.width) load_weight(w[k], p, first + k * step);
  int turn = 0;
  // All rows of a block take as many turns, as they meet in the reductions.
  for (int64_t begin = int64_t{blockIdx.x} * blockDim.y; begin < p.rows;
       begin += int64_t{gridDim.x} * blockDim.y) {
    const int64_t r = begin + threadIdx.y;
    const unsigned row = static_cast<unsigned>(r < p.rows ? r : 0);
    const int width = r < p.rows ? p.width : 0;
    Vec<T, N> x[K], dy[K];
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (const int at = first + k * step; at < width) {
        x[k] = load_columns<T, N>(p.x.at<const T>(row, p.heads), at, width, p.vectors);
        dy[k] = load_columns<T, N>(p.dy.at<const T>(row, p.heads), at, width, p.vectors);
      }
    Statistics s;
    s.reduce<Centered>(
        [&](auto f) {
#pragma unroll
          for (int k = 0; k < K; ++k)
            if (const int at = first + k * step; at < width)
#pragma unroll
              for (int i = 0; i < N; ++i)
                f(float_of(x[k][i]), float_of(dy[k][i]) * w[k][i], at + i);
        },
        p.width, p.eps, turn);
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (const int at = first + k * step; at < width) {
        if constexpr (sizeof(T) < 4) forget(x[k]), forget(dy[k]);
        float dx[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float value = float_of(x[k][i]), gradient = float_of(dy[k][i]);
          dx[i] = s.dx(value, gradient * w[k][i]);
          dweight[k][i] = fmaf(gradient, s.normalized(value), dweight[k][i]);
          if constexpr (Centered) dbias[k][i] += gradient;
        }
        write_dx<T>(p, row, at, dx);
      }
  }
  write_part(p, p.parts[0], dweight);
  if constexpr (Centered) write_part(p, p.parts[1], dbias);
}

template <class T, bool Centered>
__global__ void __launch_bounds__(kWideThreads) norm_backward_wide_kernel(BackwardRows p) {
  constexpr int N = kVector<T>, K = kWideVectors;
  const unsigned row = blockIdx.x;
  const int first = threadIdx.x * N, step = blockDim.x * N, width = p.width;
  const T* x_row = p.x.at<const T>(row, p.heads);
  const T* dy_row = p.dy.at<const T>(row, p.heads);
  Vec<T, N> x[K], dy[K];
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (const int at = first + k * step; at < width) {
      x[k] = load_columns<T, N>(x_row, at, width, p.vectors);
      dy[k] = load_columns<T, N>(dy_row, at, width, p.vectors);
    }
  // Calls f(x, dy, column) for the vectors that the thread holds, then for the others.
  auto vectors = [&](auto f) {
    const int own = opaque(first);  // or addresses computed once would spill
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if constexpr (sizeof(T) < 4) forget(x[k]), forget(dy[k]);
      if (const int at = own + k * step; at < width) f(x[k], dy[k], at);
    }
    for (int at = own + K * step; at < width; at += step)
      f(load_columns<T, N>(x_row, at, width, p.vectors),
        load_columns<T, N>(dy_row, at, width, p.vectors), at);
  };
  int turn = 0;
  Statistics s;
  s.reduce<Centered>(
      [&](auto f) {
        vectors([&](const Vec<T, N>& x, const Vec<T, N>& dy, int at) {
          float w[N];
          load_weight(w, p, at);
#pragma unroll
          for (int i = 0; i < N; ++i) f(float_of(x[i]), float_of(dy[i]) * w[i], at + i);
        });
      },
      width, p.eps, turn);
  if (threadIdx.x == 0) store(p.statistics + 2 * int64_t{row}, Vec<float, 2>{s.mean, s.scale});
  vectors([&](const Vec<T, N>& x, const Vec<T, N>& dy, int at) {
    float w[N], dx[N];
    load_weight(w, p, at);
#pragma unroll
    for (int i = 0; i < N; ++i) dx[i] = s.dx(float_of(x[i]), float_of(dy[i]) * w[i]);
    write_dx<T>(p, row, at, dx);
  });
}

// The parts of dweight and dbias of wide rows: block x takes rows x, x + parts, ..., block y a
// strip of columns.
template <class T, bool Centered>
__global__ void __launch_bounds__(256) norm_backward_columns_kernel(BackwardRows p) {
  constexpr int N = kVector<T>;
  const int at = (blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (at >= p.width) return;
  float dweight[N] = {}, dbias[N] = {};
  for (unsigned row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const auto x = load_columns<T, N>(p.x.at<const T>(row, p.heads), at, p.width, p.vectors);
    const auto dy = load_columns<T, N>(p.dy.at<const T>(row, p.heads), at, p.width, p.vectors);
    const auto s = load<Vec<float, 2>>(p.statistics + 2 * int64_t{row});
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float gradient = float_of(dy[i]);
      dweight[i] = fmaf(gradient, (float_of(x[i]) - s[0]) * s[1], dweight[i]);
      if constexpr (Centered) dbias[i] += gradient;
    }
  }
  const int64_t part = int64_t{blockIdx.x} * p.padded + at;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    store(p.parts[0] + part + i,
          Vec<float, 4>{dweight[i], dweight[i + 1], dweight[i + 2], dweight[i + 3]});
    if constexpr (Centered)
      store(p.parts[1] + part + i,
            Vec<float, 4>{dbias[i], dbias[i + 1], dbias[i + 2], dbias[i + 3]});
  }
}

// Adds the parts of dweight (block y 0) and of dbias (1): in eight groups, each in order, then the
// groups.
struct PartSums {
  const float *dweight_parts, *dbias_parts;
  Parameter dweight, dbias;
  int width, padded, n_parts;
};
__global__ void __launch_bounds__(256) norm_parts_kernel(PartSums p) {
  __shared__ Vec<float, 4> groups[8][32];
  const bool bias = blockIdx.y == 1;
  const float* parts = bias ? p.dbias_parts : p.dweight_parts;
  const int at = (blockIdx.x * 32 + threadIdx.x) * 4;
  Vec<float, 4> sum{};
  auto add = [&](const void* from) {
    const auto v = load<Vec<float, 4>>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += v[i];
  };
  if (at < p.padded)
    for (int part = threadIdx.y; part < p.n_parts; part += 8)
      add(parts + int64_t{part} * p.padded + at);
  store(&groups[threadIdx.y][threadIdx.x], sum);
  __syncthreads();
  if (threadIdx.y > 0) return;
  for (int y = 1; y < 8; ++y) add(&groups[y][threadIdx.x]);
  void* data = const_cast<void*>(bias ? p.dbias.data : p.dweight.data);
  const DType dtype = bias ? p.dbias.dtype : p.dweight.dtype;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (at + i < p.width) {
      if (dtype == DType::F32)
        store(static_cast<float*>(data) + at + i, sum[i]);
      else if (dtype == DType::F16)
        store(static_cast<f16*>(data) + at + i, round_to<f16>(sum[i]));
      else
        store(static_cast<bf16*>(data) + at + i, round_to<bf16>(sum[i]));
    }
}

template <bool Centered>
Status norm_backward(const char* name, const NormBackwardArgs& a, Stream stream) {
  BackwardRows p{};
  p.dy = rows_of(a.dy), p.x = rows_of(a.x), p.dx = rows_of(a.dx);
  p.residual_grad = rows_of(a.residual_grad);
  p.weight = parameter_of(a.weight);
  p.rows = a.x.shape[0] * a.x.shape[1];
  p.heads = static_cast<unsigned>(a.x.shape[1]);
  p.width = static_cast<int>(a.x.shape[2]);
  p.padded = static_cast<int>(norm_padded(p.width));
  p.n_parts = static_cast<int>(norm_parts(p.rows, p.width));
  p.parts[0] = a.scratch.as<float>();
  p.parts[1] = p.parts[0] + int64_t{p.n_parts} * p.padded;
  p.statistics = p.parts[1] + int64_t{p.n_parts} * p.padded;
  p.eps = a.eps;
  const Status failed = dispatch_float(a.x.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int N = kVector<T>;
    p.vectors = p.width % N == 0 && aligned<N>(a.x) && aligned<N>(a.dy) && aligned<N>(a.dx) &&
                aligned<N>(a.residual_grad) && aligned<N>(a.weight);
    const int64_t vectors = (p.width + N - 1) / N;
    if (p.width <= kNormFusedWidth) {
      const dim3 block = row_threads(vectors, 8 / N, kMaxThreads, 512);
      const int64_t blocks = (p.rows + block.y - 1) / block.y;
      p.n_parts = static_cast<int>(blocks < p.n_parts ? blocks : p.n_parts);
      const size_t shared_bytes = sizeof(float) * 8 * block.x * block.y;
      return launch(name, norm_backward_kernel<T, Centered>, dim3(p.n_parts), block, shared_bytes,
                    stream, p);
    }
    const Status error =
        launch(name, norm_backward_wide_kernel<T, Centered>, dim3(static_cast<unsigned>(p.rows)),
               row_threads(vectors, kWideVectors, kWideThreads, 1), 0, stream, p);
    if (error) return error;
    const auto strips = static_cast<unsigned>((vectors + 255) / 256);
    return launch(name, norm_backward_columns_kernel<T, Centered>, dim3(p.n_parts, strips),
                  dim3(256), 0, stream, p);
  });
  if (failed) return failed;
  const PartSums sums{
      p.parts[0], p.parts[1], parameter_of(a.dweight), parameter_of(a.dbias), p.width,
      p.padded,   p.n_parts};
  return launch(name, norm_parts_kernel, dim3((p.padded / 4 + 31) / 32, Centered ? 2 : 1),
                dim3(32, 8), 0, stream, sums);
}

}  // namespace
}  // namespace pyllm::cuda

// The baseline kernels without Python, for processors other than the one that the tests run on:
// test_portable.py compiles this for another architecture and runs it in an emulator.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "core/half.h"
#include "core/launch.h"
#include "core/thread_pool.h"
#include "cpu/kernels.h"

using namespace pyllm;

namespace {

int failures = 0;
void expect(bool ok, const char* what, double got, double expected) {
  if (ok) return;
  if (++failures <= 10) std::printf("%s: expected %.9g, got %.9g\n", what, expected, got);
}

// Each of the 65536 halves against its definition, and back.
void halves() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const f16 h = {static_cast<uint16_t>(bits)};
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double expected =
        exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    if (exponent == 31) expected = fraction ? NAN : INFINITY;
    if (bits >> 15) expected = -expected;
    const float value = to_float(h);
    const bool nan = std::isnan(expected);
    expect(nan ? std::isnan(value) : value == expected, "float of a half", value, expected);
    const uint16_t back = from_float<f16>(value).bits;
    expect(nan ? (back & 0x7c00) == 0x7c00 && back & 1023 : back == bits, "half of a float", back,
           bits);
  }
}

// One op through the table, the launch and the pool, against its formula.
void rms_norm() {
  constexpr int64_t kRows = 37, kWidth = 77;
  std::vector<float> x(kRows * kWidth), weight(kWidth), y(kRows * kWidth, NAN);
  uint32_t state = 1;
  for (std::vector<float>* v : {&x, &weight})
    for (float& value : *v)
      value = static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24f - 0.5f;
  const auto tensor = [](std::vector<float>& v, std::initializer_list<int64_t> shape) {
    Tensor t;
    t.data = v.data();
    for (int64_t size : shape) t.shape[t.ndim++] = size;
    for (int64_t i = t.ndim - 1, stride = 1; i >= 0; stride *= t.shape[i--]) t.stride[i] = stride;
    return t;
  };
  RmsNormArgs args{};
  args.x = tensor(x, {kRows, 1, kWidth});
  args.weight = tensor(weight, {kWidth});
  args.y = tensor(y, {kRows, 1, kWidth});
  args.eps = 1e-5f;
  args.tokens_per_chunk = 4;
  ThreadPool::get().resize(2);
  const Launch launch = make_launch("rms_norm", kernels().rms_norm, args);
  submit(&launch, 1);
  for (int64_t r = 0; r < kRows; ++r) {
    double squares = 0;
    for (int64_t i = 0; i < kWidth; ++i) squares += double(x[r * kWidth + i]) * x[r * kWidth + i];
    for (int64_t i = 0; i < kWidth; ++i) {
      const double expected = x[r * kWidth + i] / std::sqrt(squares / kWidth + 1e-5) * weight[i];
      const float got = y[r * kWidth + i];
      expect(std::abs(got - expected) <= 1e-6, "rms_norm", got, expected);
    }
  }
}

}  // namespace

int main() {
  halves();
  rms_norm();
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}

#include "bindings/quant_matrix.h"
#include "core/thread_pool.h"

namespace pyllm {
namespace {

// Several chunks a thread, so that they balance, each of panels that stay in L2 while the tokens
// pass. Tokens are divided too: where there are too few panels, and so that a thread works on a
// part of the rows of x and y only, which its own caches then hold.
QuantMatmulArgs split(const Tensor& q, const QuantMatrix& w, const Tensor& bias, const Tensor& y) {
  constexpr int64_t kCache = 512 * 1024, kPerThread = 6, kTile = 12, kTokens = 128;
  const int64_t tokens = q.shape[0], wanted = kPerThread * ThreadPool::get().size();
  const int64_t fit = std::max<int64_t>(kCache / w.panel_bytes(), 1);
  QuantMatmulArgs a{q, bias, y, w, 1, tokens};
  a.panels_per_chunk =
      std::clamp<int64_t>(w.panels() / wanted, 1, tokens > kTile ? fit : w.panels());
  const int64_t blocks =
      std::max<int64_t>(wanted / a.panel_chunks(), (tokens + kTokens - 1) / kTokens);
  a.tokens_per_chunk = std::max<int64_t>((tokens / blocks + kTile - 1) / kTile * kTile, kTile);
  return a;
}

Launch multiply(const Tensor& q, const QuantMatrix& w, const Tensor& bias, const Tensor& y) {
  // A weight is read at some ten bytes a nanosecond, and multiplied by some hundred numbers.
  return make_launch("quant_matmul", kernels().quant_matmul, split(q, w, bias, y),
                     w.bytes() / 10 + w.n * w.k * q.shape[0] / 100);
}

Launch quantize(const Tensor& x, const Tensor& q, int group_size) {
  return make_launch(
      "quantize_activation", kernels().quantize_activation,
      QuantizeActivationArgs{x, q, group_size, rows_per_chunk(x.shape[0], x.shape[1])},
      x.numel() / 2);
}

void quantize_activation(Tensor x, Tensor q, int group_size) {
  Check c("quantize_activation");
  c(x, "x", "T K", kFloats);
  check_quantized(c, q, "out", x.shape[1], group_size);
  if (x.numel() == 0) return;
  run(quantize(x, q, group_size));
}

void check_out(Check& c, const Tensor& y, int64_t n) {
  c(y, "out", "T N", kFloats);
  c.require(y.shape[1] == n, "out: expected [T, ", n, "], got ", y);
}

void quant_matmul(Tensor q, Tensor packed, int64_t n, int64_t k, int bits, int group_size,
                  bool has_minimum, Tensor bias, Tensor y) {
  Check c("quant_matmul");
  const QuantMatrix w = quant_matrix(c, packed, n, k, bits, group_size, has_minimum);
  check_quantized(c, q, "x", k, group_size);
  check_out(c, y, n);
  c.optional(bias, "bias", "N", {DType::F32});
  if (y.numel() == 0) return;
  run(multiply(q, w, bias, y));
}

// x is quantized first.
py::object quantize_matmul(py::handle x_object, Tensor packed, int64_t n, int64_t k, int bits,
                           int group_size, bool has_minimum, Tensor bias, py::handle out) {
  Check c("quant_matmul");
  const QuantMatrix w = quant_matrix(c, packed, n, k, bits, group_size, has_minimum);
  const Tensor given = tensor_from_python(x_object), x = as_rows(given);
  c(x, "x", "T K", kFloats);
  c.require(x.shape[1] == k, "x: expected [T, ", k, "], got ", x);
  const Output output = output_rows(out, x_object, given, n);
  const Tensor y = as_rows(output.tensor);
  check_out(c, y, n);
  c.optional(bias, "bias", "N", {DType::F32});
  if (y.numel() == 0) return output.object;
  const Scratch q = scratch(x.shape[0], ActivationLayout{k, group_size}.row_bytes());
  run(quantize(x, q.tensor, group_size), multiply(q.tensor, w, bias, y));
  return output.object;
}

void pack_fragments_checked(Tensor packed, int64_t n, int64_t k, int bits, int packed_group_size,
                            bool has_minimum, int group_size, Tensor out) {
  Check c("pack_fragments");
  const QuantMatrix w = quant_matrix(c, packed, n, k, bits, packed_group_size, has_minimum);
  const QuantFragments f = quant_fragments(c, n, k, bits, group_size, has_minimum);
  check_bytes(c, out, f.bytes());
  py::gil_scoped_release release;
  pack_fragments(w, f, out.as<uint8_t>());
}

void check_matrix(const Check& c, int64_t n, int64_t k, int bits, int group_size) {
  c.require(bits == 4 || bits == 8, "weight: expected 4 or 8 bits, got ", bits);
  c.require(
      n > 0 && k > 0 && n < (int64_t{1} << 31) && k < (int64_t{1} << 31) && k % group_size == 0,
      "weight: expected K to be a multiple of ", group_size, ", got [", n, ", ", k, "]");
}

}  // namespace

QuantFragments quant_fragments(const Check& c, int64_t n, int64_t k, int bits, int group_size,
                               bool has_minimum) {
  c.require((group_size == k && k % 16 == 0) || group_size == 16 || group_size == 32 ||
                group_size == 64 || group_size == 128,
            "weight: expected groups of 16, 32, 64, 128 or K, got ", group_size);
  check_matrix(c, n, k, bits, group_size);
  return {n, k, bits, group_size, has_minimum};
}

void check_bytes(const Check& c, const Tensor& packed, int64_t bytes) {
  c.require(packed.dtype == DType::U8 && packed.ndim == 1 && packed.shape[0] == bytes &&
                packed.stride[0] == 1,
            "weight: expected packed uint8[", bytes, "], got ", packed);
}

QuantMatrix quant_matrix(const Check& c, const Tensor& packed, int64_t n, int64_t k, int bits,
                         int group_size, bool has_minimum) {
  c.require(group_size == 16 || group_size == 32, "weight: expected groups of 16 or 32, got ",
            group_size);
  check_matrix(c, n, k, bits, group_size);
  const QuantMatrix w{packed.as<uint8_t>(), n, k, bits, group_size, has_minimum};
  check_bytes(c, packed, w.bytes());
  return w;
}

void register_quant_matmul(py::module_& m) {
  m.def("pack_fragments", &pack_fragments_checked);
  def_fast<&quantize_activation>(m, "quantize_activation");
  def_fast<&quant_matmul>(m, "quant_matmul");
  def_fast<&quantize_matmul>(m, "quantize_matmul");
}

}  // namespace pyllm

#include "bindings/bindings.h"
#include "core/thread_pool.h"

namespace pyllm {
namespace {

py::object matmul(py::handle x_object, Tensor w, Tensor bias, py::handle out) {
  const Tensor given = tensor_from_python(x_object), x = as_rows(given);
  Check c("matmul");
  c(w, "weight", "N K", kFloats);
  c(x, "x", "T K", kFloats);
  c.optional(bias, "bias", "N", {DType::F32});
  const Output output = output_rows(out, x_object, given, c.dim("N"));
  const Tensor y = as_rows(output.tensor);
  c(y, "out", "T N", kFloats);
  if (y.numel() == 0) return output.object;
  // Several chunks a thread, in whole tiles; tokens in blocks that stay in L2 while w passes.
  constexpr int64_t kTokenBytes = 512 * 1024, kWanted = 6, kTileRows = 6, kTileTokens = 4;
  const int64_t tokens = x.shape[0], n = w.shape[0], threads = ThreadPool::get().size();
  const int64_t row_bytes = std::max<int64_t>(4 * x.shape[1], 1);
  const int64_t fit =
      std::max<int64_t>(kTokenBytes / row_bytes / kTileTokens * kTileTokens, kTileTokens);
  const int64_t block = std::min(tokens, fit);
  const int64_t wanted = std::max<int64_t>(kWanted * threads * block / tokens, 1);
  const int64_t tiles = (n + kTileRows - 1) / kTileRows;
  const int64_t rows = std::max<int64_t>(tiles / wanted, 1) * kTileRows;
  // A weight is read at some ten bytes a nanosecond, and multiplied by some forty numbers.
  const int64_t work = w.numel() * item_size(w.dtype) / 10 + w.numel() * tokens / 40;
  run(make_launch("matmul", kernels().matmul, MatmulArgs{x, w, bias, y, rows, block}, work));
  return output.object;
}

}  // namespace

void register_matmul(py::module_& m) { def_fast<&matmul>(m, "matmul"); }

}  // namespace pyllm

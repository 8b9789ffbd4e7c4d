#include "bindings/bindings.h"
#include "core/thread_pool.h"

namespace pyllm {
namespace {

void matmul(Tensor x, Tensor w, Tensor bias, Tensor y) {
  x = as_rows(x), y = as_rows(y);
  Check c("matmul");
  c(w, "weight", "N K", kFloats);
  c(x, "x", "T K", kFloats);
  c.optional(bias, "bias", "N", {DType::F32});
  c(y, "out", "T N", kFloats);
  if (y.numel() == 0) return;
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
}

}  // namespace

void register_matmul(py::module_& m) { def_fast<&matmul>(m, "matmul"); }

}  // namespace pyllm

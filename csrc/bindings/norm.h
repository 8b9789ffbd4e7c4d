// What the norms share: how long they take, and what they return, y, and with a residual the sum
// that was normalized.
#pragma once
#include "bindings/bindings.h"

namespace pyllm {

// Nanoseconds of one thread for rows in memory, at some 20 GB/s; for halves it is arithmetic.
inline int64_t norm_work(const Tensor& x, const Tensor& residual) {
  return x.numel() * (residual.defined() ? 3 : 2) / 5;
}

struct NormOutputs {
  Output y, total;
  Tensor rows, sums;  // as [T, H, D]; sums is undefined without a residual

  NormOutputs(Check& c, py::handle x, const Tensor& like, const Tensor& residual, py::handle out,
              py::handle residual_out)
      : y(output_like(out, x, like)), rows(with_heads(y.tensor)) {
    c(rows, "out", "T H D", {like.dtype});
    set_total(c, x, like, residual, residual_out);
  }
  // Without y.
  NormOutputs(Check& c, py::handle x, const Tensor& like, const Tensor& residual,
              py::handle residual_out)
      : y{py::none(), {}} {
    set_total(c, x, like, residual, residual_out);
  }

  py::object result() const {
    return sums.defined() ? py::make_tuple(y.object, total.object) : y.object;
  }

 private:
  void set_total(Check& c, py::handle x, const Tensor& like, const Tensor& residual,
                 py::handle residual_out) {
    c.require(residual.defined() || residual_out.is_none(),
              "residual_out: expected None without a residual");
    if (!residual.defined()) return;
    c(residual, "residual", "T H D", {like.dtype});
    total = output_like(residual_out, x, like);
    sums = with_heads(total.tensor);
    c(sums, "residual_out", "T H D", {like.dtype});
  }
};

}  // namespace pyllm

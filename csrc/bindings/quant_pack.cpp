// Conversion of GGUF tensors; the bytes may come from anything that Python can lend as a buffer.
#include "core/quant_pack.h"

#include <pybind11/stl.h>

#include <deque>

#include "bindings/bindings.h"

namespace pyllm {
namespace {

// Bytes lent by Python until this goes out of scope.
struct Loan {
  Py_buffer view;
  explicit Loan(py::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  Loan(const Loan&) = delete;
  ~Loan() { PyBuffer_Release(&view); }
};

// A checked list of (bytes, rows), and the matrix that they make.
struct Sources {
  Sources(const Check& c, const py::list& list, GgmlType type, int64_t k) {
    const GgmlFormat& f = format_of(type);
    c.require(k > 0 && k < (int64_t{1} << 31) && k % f.block_size == 0,
              "expected K to be a multiple of ", f.block_size, " for ", f.name, ", got K = ", k);
    const int64_t row_bytes = k / f.block_size * f.block_bytes;
    for (py::handle item : list) {
      const auto [object, n] = item.cast<std::pair<py::object, int64_t>>();
      const Py_buffer& view = loans.emplace_back(object).view;
      c.require(n > 0 && view.len / row_bytes == n && view.len % row_bytes == 0, "expected ", n,
                " rows of ", row_bytes, " bytes (", f.name, ", K = ", k, "), got ", view.len,
                " bytes");
      rows.push_back({static_cast<const uint8_t*>(view.buf), n});
      matrix.n += n;
    }
    c.require(matrix.n > 0 && matrix.n < (int64_t{1} << 31), "expected 1 to 2^31 rows, got ",
              matrix.n);
    matrix.k = k;
    matrix.bits = f.bits;
    matrix.group_size = f.group_size;
    matrix.has_minimum = f.has_minimum;
  }

  std::deque<Loan> loans;
  std::vector<GgmlRows> rows;
  QuantMatrix matrix;
};

GgmlType type_named(const Check& c, const std::string& name) {
  std::string names;
  for (size_t i = 0; i < std::size(kGgmlFormats); ++i) {
    if (name == kGgmlFormats[i].name) return static_cast<GgmlType>(i);
    names += (i ? ", " : "") + std::string(kGgmlFormats[i].name);
  }
  c.fail("expected a type of " + names + ", got '" + name + "'");
}

py::tuple packed_format(const py::list& sources, const std::string& type, int64_t k) {
  Check c("from_gguf");
  const Sources s(c, sources, type_named(c, type), k);
  return py::make_tuple(s.matrix.bits, s.matrix.group_size, s.matrix.has_minimum, s.matrix.n,
                        s.matrix.bytes());
}

void pack(const py::list& sources, const std::string& type_name, int64_t k, Tensor out) {
  Check c("from_gguf");
  const GgmlType type = type_named(c, type_name);
  const Sources s(c, sources, type, k);
  c(out, "out", "_", {DType::U8}, true);
  c.require(out.shape[0] == s.matrix.bytes(), "out: expected uint8[", s.matrix.bytes(), "], got ",
            out);
  py::gil_scoped_release release;
  pack_ggml(s.rows, type, s.matrix, out.as<uint8_t>());
}

}  // namespace

void register_quant_pack(py::module_& m) {
  m.def("packed_format", &packed_format);
  m.def("pack_ggml", &pack);
}

}  // namespace pyllm

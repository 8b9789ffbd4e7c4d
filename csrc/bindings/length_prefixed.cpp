// Arrays of length-prefixed strings, the one part of a GGUF header that is too long for Python: a
// vocabulary has 10^5 of them, each found only by walking over those before it. 98 000 strings
// take 0.2 ms to skip here and 18 ms in Python.
#include <cstring>

#include "bindings/bindings.h"

namespace pyllm {
namespace {

// Calls visit(bytes, length) for each string: a little-endian uint64 length, then the bytes.
// Returns where the last one ends, or -1 if it would end outside the buffer.
template <class Visit>
int64_t walk(const py::buffer_info& info, int64_t offset, int64_t count, Visit visit) {
  const auto* data = static_cast<const char*>(info.ptr);
  const int64_t size = info.size * info.itemsize;
  if (offset < 0 || offset > size || count < 0) return -1;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t length;
    if (size - offset < static_cast<int64_t>(sizeof length)) return -1;
    std::memcpy(&length, data + offset, sizeof length);
    offset += sizeof length;
    if (length > static_cast<uint64_t>(size - offset)) return -1;
    visit(data + offset, static_cast<int64_t>(length));
    offset += static_cast<int64_t>(length);
  }
  return offset;
}

py::object decode(const char* s, int64_t n) {
  PyObject* text = PyUnicode_DecodeUTF8(s, n, nullptr);
  if (text == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(text);
}

}  // namespace

void register_length_prefixed(py::module_& m) {
  m.def(
      "skip_strings",
      [](const py::buffer& buffer, int64_t offset, int64_t count) {
        return walk(buffer.request(), offset, count, [](const char*, int64_t) {});
      },
      py::arg("buffer"), py::arg("offset"), py::arg("count"),
      "Where `count` length-prefixed strings at `offset` end, or -1 if not inside the buffer.");
  m.def(
      "read_pairs",
      [](const py::buffer& buffer, int64_t offset, int64_t count) {
        py::list pairs;
        const int64_t end = walk(buffer.request(), offset, count, [&](const char* s, int64_t n) {
          const auto* space = static_cast<const char*>(std::memchr(s, ' ', n));
          if (space == nullptr || std::memchr(space + 1, ' ', s + n - space - 1) != nullptr)
            throw ArgumentError("expected two words and a space");
          pairs.append(py::make_tuple(decode(s, space - s), decode(space + 1, s + n - space - 1)));
        });
        if (end < 0) throw ArgumentError("read_pairs: the strings run past the buffer");
        return pairs;
      },
      py::arg("buffer"), py::arg("offset"), py::arg("count"),
      "As read_strings, each cut in two at its one space; ValueError if one is not of that form.");
  m.def(
      "read_strings",
      [](const py::buffer& buffer, int64_t offset, int64_t count) {
        py::list strings;
        const int64_t end = walk(buffer.request(), offset, count,
                                 [&](const char* s, int64_t n) { strings.append(decode(s, n)); });
        if (end < 0) throw ArgumentError("read_strings: the strings run past the buffer");
        return strings;
      },
      py::arg("buffer"), py::arg("offset"), py::arg("count"),
      "The strings as a list of str; UnicodeDecodeError if one is not UTF-8.");
}

}  // namespace pyllm

#include "core/check.h"

#include <algorithm>

namespace pyllm {

std::string describe(const Tensor& t) {
  std::string s = std::string(name(t.dtype)) + "[";
  for (int i = 0; i < t.ndim; ++i) s += (i ? ", " : "") + std::to_string(t.shape[i]);
  return s + "]";
}

void Check::fail(const std::string& message) const {
  throw ArgumentError(std::string(op_) + ": " + message);
}

int64_t* Check::find(std::string_view name) {
  for (int i = 0; i < n_dims_; ++i)
    if (dims_[i].name == name) return &dims_[i].size;
  return nullptr;
}

int64_t Check::dim(std::string_view name) const {
  const int64_t* size = const_cast<Check*>(this)->find(name);
  if (!size) fail("internal error: no dimension is named " + std::string(name));
  return *size;
}

void Check::operator()(const Tensor& t, const char* name, std::string_view shape,
                       const DType* dtypes, size_t n_dtypes, bool contiguous) {
  auto expected = [&] {
    std::string s = std::string(name) + ": expected ";
    for (size_t i = 0; i < n_dtypes; ++i) s += (i ? "|" : "") + std::string(pyllm::name(dtypes[i]));
    return s + "[" + std::string(shape) + "], got " + describe(t);
  };
  if (std::find(dtypes, dtypes + n_dtypes, t.dtype) == dtypes + n_dtypes) fail(expected());

  int axis = 0;
  for (size_t at = 0; at < shape.size(); ++axis) {
    const size_t end = std::min(shape.find(' ', at), shape.size());
    const std::string_view word = shape.substr(at, end - at);
    at = end + 1;
    if (axis >= t.ndim) fail(expected());
    const int64_t size = t.shape[axis];
    if (word == "_") continue;
    if (word[0] >= '0' && word[0] <= '9') {
      if (size != std::stoll(std::string(word))) fail(expected());
    } else if (int64_t* bound = find(word)) {
      if (*bound != size)
        fail(expected() + " (" + std::string(word) + " is " + std::to_string(*bound) + ")");
    } else {
      dims_.at(n_dims_++) = {word, size};
    }
  }
  if (axis != t.ndim) fail(expected());
  if (t.numel() == 0) return;
  if (reinterpret_cast<uintptr_t>(t.data) % static_cast<size_t>(item_size(t.dtype)))
    fail(std::string(name) + ": expected data aligned to its " +
         std::to_string(item_size(t.dtype)) + " bytes a value");
  if (t.ndim > 0 && t.shape[t.ndim - 1] > 1 && t.stride[t.ndim - 1] != 1)
    fail(std::string(name) + ": expected a contiguous last dimension, got stride " +
         std::to_string(t.stride[t.ndim - 1]));
  if (contiguous) {
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; stride *= t.shape[i--])
      if (t.shape[i] > 1 && t.stride[i] != stride)
        fail(std::string(name) + ": expected a contiguous tensor, got stride " +
             std::to_string(t.stride[i]) + " where " + std::to_string(stride) + " was expected");
  }
}

void Check::same_dtype(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name) {
  if (a.dtype != b.dtype)
    fail(std::string(b_name) + ": expected the dtype of " + a_name + " (" + pyllm::name(a.dtype) +
         "), got " + pyllm::name(b.dtype));
}

}  // namespace pyllm

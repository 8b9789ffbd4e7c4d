// Declarative argument checks. A binding states its signature once, and a mismatch says what was
// expected and what came:
//
//   Check c("rms_norm");
//   c(x, "x", "T D", kFloats);
//   c(weight, "weight", "D", kFloats);
//
// Names are dimensions: the first use binds a name to a size, later uses must agree. A number is an
// exact size, `_` any size. The last dimension must be contiguous; the others may have any stride.
#pragma once
#include <array>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "core/tensor.h"

namespace pyllm {

// Becomes ValueError in Python.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

using DTypes = std::initializer_list<DType>;
inline constexpr DTypes kFloats = {DType::F32, DType::BF16, DType::F16};

std::string describe(const Tensor& t);

inline std::string text(std::string part) { return part; }
inline std::string text(const Tensor& part) { return describe(part); }
template <class Number>
  requires std::is_arithmetic_v<Number>
std::string text(Number part) {
  return std::to_string(part);
}

class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  void operator()(const Tensor& t, const char* name, std::string_view shape, DTypes dtypes,
                  bool contiguous = false) {
    (*this)(t, name, shape, dtypes.begin(), dtypes.size(), contiguous);
  }
  void operator()(const Tensor& t, const char* name, std::string_view shape, const DType* dtypes,
                  size_t n_dtypes, bool contiguous = false);
  // Like operator(), but an undefined tensor (None in Python) passes.
  void optional(const Tensor& t, const char* name, std::string_view shape, DTypes dtypes,
                bool contiguous = false) {
    if (t.defined()) (*this)(t, name, shape, dtypes, contiguous);
  }
  void same_dtype(const Tensor& a, const char* a_name, const Tensor& b, const char* b_name);
  // A condition that the shapes cannot express. The parts of the message, which says what was
  // expected, are texts, numbers and tensors, put together only where it fails.
  template <class... Parts>
  void require(bool ok, const Parts&... parts) const {
    if (!ok) [[unlikely]]
      fail((text(parts) + ...));
  }
  // The size bound to a dimension's name.
  int64_t dim(std::string_view name) const;
  [[noreturn]] void fail(const std::string& message) const;

 private:
  int64_t* find(std::string_view name);

  const char* op_;
  struct Dim {
    std::string_view name;
    int64_t size;
  };
  std::array<Dim, 16> dims_;
  int n_dims_ = 0;
};

}  // namespace pyllm

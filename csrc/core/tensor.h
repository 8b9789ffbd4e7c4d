// A tensor as the kernels see it: a pointer, a dtype, sizes and strides. No torch, no Python.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pyllm {

enum class DType : uint8_t { F32, BF16, F16, F64, I8, U8, I32, I64, Bool, E4M3 };

inline constexpr const char* kDTypeNames[] = {"float32", "bfloat16",     "float16", "float64",
                                              "int8",    "uint8",        "int32",   "int64",
                                              "bool",    "float8_e4m3fn"};
inline const char* name(DType dtype) { return kDTypeNames[static_cast<int>(dtype)]; }

inline constexpr int kItemSizes[] = {4, 2, 2, 8, 1, 1, 4, 8, 1, 1};
inline int item_size(DType dtype) { return kItemSizes[static_cast<int>(dtype)]; }

inline constexpr int kMaxDims = 4;

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::F32;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements

  bool defined() const { return data != nullptr || ndim != 0; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  // The start of row i, or of row j in block i: where the leading indices are given.
  template <class T>
  T* row(int64_t i) const {
    return static_cast<T*>(data) + i * stride[0];
  }
  template <class T>
  T* row(int64_t i, int64_t j) const {
    return static_cast<T*>(data) + i * stride[0] + j * stride[1];
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace pyllm

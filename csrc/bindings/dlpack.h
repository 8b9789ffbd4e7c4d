// What we use of DLPack's C ABI, version 1: the functions with which a library lends its tensors,
// found in the capsule that the type of a tensor has as `__dlpack_c_exchange_api__`.
// Source: https://dmlc.github.io/dlpack/latest/c_api.html (dlpack.h, version 1.3). The layout of a
// major version does not change.
#pragma once
#include <cstdint>

namespace pyllm::dlpack {

inline constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
inline constexpr const char* kCapsule = "dlpack_exchange_api";
inline constexpr uint32_t kMajor = 1;

struct Version {
  uint32_t major, minor;
};

inline constexpr int32_t kCpu = 1;
struct Device {
  int32_t type, id;
};

enum Code : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6, kE4M3FN = 10 };
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;  // of an older major version, or null
  void (*allocate)();     // the functions that we do not call have another type
  void (*managed_from_python)();
  void (*managed_to_python)();
  // Fills in `out`, which is valid while the object lives. 0, or -1 with a Python exception; may be
  // null.
  int (*from_python)(void* object, Tensor* out);
  void (*current_stream)();
};

}  // namespace pyllm::dlpack

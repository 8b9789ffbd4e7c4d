// What the bindings of the CUDA kernels of flash_attention and paged_attention share.
#pragma once
#include "bindings/attention.h"
#include "bindings/device_library.h"

namespace pyllm {

// The options, and tensors of [..., heads, D] whose rows are copied in pieces of 16 bytes.
inline void check_cuda_attention(Check& c, const AttentionOptions& options,
                                 std::initializer_list<DeviceLibrary::Named> tensors) {
  const int64_t d = c.dim("D");
  check_attention_options(c, options);
  for (const auto& [name, t] : tensors) {
    const int64_t per_16_bytes = 16 / item_size(t.dtype);
    c.require(d % per_16_bytes == 0, name, ": expected a head dim that is a multiple of ",
              per_16_bytes, " in ", pyllm::name(t.dtype), ", got ", d);
    bool aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
    for (int i = 0; i + 1 < t.ndim; ++i)
      aligned &= t.shape[i] <= 1 || t.stride[i] % per_16_bytes == 0;
    c.require(aligned || t.numel() == 0, name,
              ": expected rows that begin on multiples of 16 bytes, got ", t,
              " with other strides or address");
    for (int i = 0; i < t.ndim; ++i)
      c.require(t.shape[i] < int64_t{1} << 31, name, ": expected sizes below 2^31, got ", t);
  }
}

}  // namespace pyllm

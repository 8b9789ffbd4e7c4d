#pragma once
#include "core/tensor.h"

namespace pyllm {

enum class Activation : int32_t { kRelu, kSilu, kGelu, kGeluTanh };
inline constexpr const char* kActivationNames[] = {"relu", "silu", "gelu", "gelu_tanh"};

// y = f(x), or f(x) * up, rounded once. All are [T, H, D] with any strides but the last. A chunk is
// a block of T times a block of D, so that one long row is shared out too. Where `quantized` is
// given, y is not written but quantized there, for a matmul that follows; then H is 1.
struct ActivationArgs {
  Tensor x, up, y, quantized;
  int group_size;
  Activation kind;
  int64_t tokens_per_chunk;
  static constexpr int64_t kColumns = 4096;
  int64_t blocks() const { return (x.shape[2] + kColumns - 1) / kColumns; }
  int64_t chunks() const {
    return (x.shape[0] + tokens_per_chunk - 1) / tokens_per_chunk * blocks();
  }
};

}  // namespace pyllm

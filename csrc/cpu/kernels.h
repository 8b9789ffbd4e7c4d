// The table of CPU kernels: one entry a kernel, one table an instruction set, chosen once.
#pragma once
#include "core/cpu_features.h"
#include "cpu/activation.h"
#include "cpu/attention.h"
#include "cpu/embedding.h"
#include "cpu/layer_norm.h"
#include "cpu/limits.h"
#include "cpu/matmul.h"
#include "cpu/norm_backward.h"
#include "cpu/quant_matmul.h"
#include "cpu/quantize_activation.h"
#include "cpu/rms_norm.h"
#include "cpu/rope_cache.h"
#include "cpu/sample.h"

namespace pyllm {

struct Kernels {
#define PYLLM_CPU_KERNEL(function, Args) void (*function)(const Args&, int64_t chunk);
#include "cpu/kernels.def"
#undef PYLLM_CPU_KERNEL
};

namespace baseline {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}

inline const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    switch (selected_isa()) {
#if defined(PYLLM_X86)
      case Isa::kAvx512: return avx512::table;
      case Isa::kAvx2: return avx2::table;
#endif
      default: return baseline::table;
    }
  }();
  return chosen;
}

}  // namespace pyllm

#include "core/cpu_features.h"

#include <algorithm>
#include <cstdlib>

#include "core/check.h"

namespace pyllm {

std::vector<Isa> available_isas() {
  std::vector<Isa> isas = {Isa::kBaseline};
#if defined(PYLLM_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2) isas.push_back(Isa::kAvx2);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
    isas.push_back(Isa::kAvx512);
#endif
  return isas;
}

Isa selected_isa() {
  static const Isa isa = [] {
    const std::vector<Isa> isas = available_isas();
    const char* wanted = std::getenv("PYLLM_CPU_ISA");
    if (!wanted || !*wanted) return isas.back();
    std::string names;
    for (Isa i : isas) {
      if (std::string(wanted) == kIsaNames[static_cast<int>(i)]) return i;
      names += (names.empty() ? "" : ", ") + std::string(kIsaNames[static_cast<int>(i)]);
    }
    throw ArgumentError("PYLLM_CPU_ISA: expected one of " + names + " on this processor, got '" +
                        wanted + "'");
  }();
  return isa;
}

}  // namespace pyllm

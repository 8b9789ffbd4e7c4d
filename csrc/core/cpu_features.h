// Which of the compiled instruction sets this processor has, and which one we use.
#pragma once
#include <string>
#include <vector>

namespace pyllm {

// In order of preference, worst first. AVX512 means F, BW, DQ, VL, VNNI and BF16 together (Zen 4,
// Cooper Lake, Sapphire Rapids and later).
enum class Isa { kBaseline, kAvx2, kAvx512 };
inline constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};

// Those that are compiled in and that this processor can run.
std::vector<Isa> available_isas();
// The best available, or PYLLM_CPU_ISA. Throws ArgumentError if that names none or one that is
// not available.
Isa selected_isa();

}  // namespace pyllm

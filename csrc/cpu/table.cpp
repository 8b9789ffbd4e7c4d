// Compiled once per instruction set, like the kernels that it lists.
#include "cpu/kernels.h"

namespace pyllm::PYLLM_ISA {

#define PYLLM_CPU_KERNEL(function, Args) void function(const Args&, int64_t chunk);
#include "cpu/kernels.def"
#undef PYLLM_CPU_KERNEL

const Kernels table = {
#define PYLLM_CPU_KERNEL(function, Args) .function = &function,
#include "cpu/kernels.def"
#undef PYLLM_CPU_KERNEL
};

}  // namespace pyllm::PYLLM_ISA

// Panels of quantized weights to the order of fragments, once a weight; see core/quant_fragments.h.
// A thread gathers 16 bytes.
#include "cuda/primitives.cuh"
#include "cuda/quant_matmul.h"

namespace pyllm::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    pack_fragments_kernel(QuantMatrix w, QuantFragments f, uint8_t* out) {
  const int vectors = f.span_bytes() / 16;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, span = index / vectors;
  if (span >= f.strips() * f.spans()) return;
  const int word = static_cast<int>(index % vectors) * 4;
  Vec<uint32_t, 4> words;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words[i] = fragment_word(w, f, span / f.spans(), span % f.spans(), word + i);
  store(out + index * 16, words);
}

}  // namespace

Status pack_fragments(const PackFragmentsArgs& a, Stream stream) {
  const int64_t blocks = (a.format.bytes() / 16 + kThreads - 1) / kThreads;
  return launch("pack_fragments", pack_fragments_kernel, dim3(static_cast<unsigned>(blocks)),
                dim3(kThreads), 0, stream, a.weight, a.format, a.out.as<uint8_t>());
}

}  // namespace pyllm::cuda

// The kernels, their floors and what was decided: norm_forward.cuh and norm_backward.cuh.
#include "cuda/norm_backward.cuh"
#include "cuda/norm_forward.cuh"

namespace pyllm::cuda {

Status rms_norm(const NormArgs& a, Stream stream) {
  return norm_forward<false>("rms_norm", a, stream);
}
Status rms_norm_backward(const NormBackwardArgs& a, Stream stream) {
  return norm_backward<false>("rms_norm_backward", a, stream);
}

}  // namespace pyllm::cuda

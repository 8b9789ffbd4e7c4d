// The kernels, their floors and what was decided: norm_forward.cuh and norm_backward.cuh.
#include "cuda/norm_backward.cuh"
#include "cuda/norm_forward.cuh"

namespace pyllm::cuda {

Status layer_norm(const NormArgs& a, Stream stream) {
  return norm_forward<true>("layer_norm", a, stream);
}
Status layer_norm_backward(const NormBackwardArgs& a, Stream stream) {
  return norm_backward<true>("layer_norm_backward", a, stream);
}

}  // namespace pyllm::cuda

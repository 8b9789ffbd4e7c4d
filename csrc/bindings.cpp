#include <pybind11/pybind11.h>

namespace pyllm {
void register_runtime(pybind11::module_& m);
void register_check(pybind11::module_& m);
void register_output(pybind11::module_& m);
void register_route(pybind11::module_& m);
void register_length_prefixed(pybind11::module_& m);
void register_layer_norm(pybind11::module_& m);
void register_rms_norm(pybind11::module_& m);
void register_norm_backward(pybind11::module_& m);
void register_activation(pybind11::module_& m);
void register_flash_attention(pybind11::module_& m);
void register_paged_attention(pybind11::module_& m);
void register_rope_cache(pybind11::module_& m);
void register_quant_matmul(pybind11::module_& m);
void register_quant_pack(pybind11::module_& m);
void register_limits(pybind11::module_& m);
void register_sample(pybind11::module_& m);
void register_matmul(pybind11::module_& m);
void register_embedding(pybind11::module_& m);
void register_device_library(pybind11::module_& m);
}  // namespace pyllm

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of pyllm: CPU kernels, the thread pool and the plan.";
  pyllm::register_runtime(m);
  pyllm::register_check(m);
  pyllm::register_output(m);
  pyllm::register_route(m);
  pyllm::register_length_prefixed(m);
  pyllm::register_layer_norm(m);
  pyllm::register_rms_norm(m);
  pyllm::register_norm_backward(m);
  pyllm::register_activation(m);
  pyllm::register_flash_attention(m);
  pyllm::register_paged_attention(m);
  pyllm::register_rope_cache(m);
  pyllm::register_quant_matmul(m);
  pyllm::register_quant_pack(m);
  pyllm::register_limits(m);
  pyllm::register_sample(m);
  pyllm::register_matmul(m);
  pyllm::register_embedding(m);
  pyllm::register_device_library(m);
}

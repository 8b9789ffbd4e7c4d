// The floor is bytes over bandwidth, K * itemsize read a row; in a decoding step it is one row, and
// the reductions of each group (latency) are what it takes.
#include <type_traits>

#include "cpu/quantize_row.h"

namespace pyllm::PYLLM_ISA {

void quantize_activation(const QuantizeActivationArgs& a, int64_t chunk) {
  const int64_t begin = chunk * a.tokens_per_chunk;
  const int64_t end = smaller(begin + a.tokens_per_chunk, a.x.shape[0]);
  const ActivationLayout layout{a.x.shape[1], a.group_size};
  dispatch_float(a.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    for (int64_t i = begin; i < end; ++i)
      quantize_groups({a.q.row<uint8_t>(i), layout}, 0, layout.groups(),
                      [x = a.x.row<T>(i)](int64_t k) { return load(x + k); });
  });
}

}  // namespace pyllm::PYLLM_ISA

#include "core/quant_fragments.h"

#include <cstring>

#include "core/launch.h"
#include "core/thread_pool.h"

namespace pyllm {
namespace {

struct FragmentsArgs {
  QuantMatrix matrix;
  QuantFragments fragments;
  uint8_t* out;
  int64_t chunks() const { return fragments.strips(); }
};

void pack_strip(const FragmentsArgs& a, int64_t strip) {
  const QuantFragments& f = a.fragments;
  uint8_t* to = a.out + strip * f.spans() * f.span_bytes();
  for (int64_t span = 0; span < f.spans(); ++span)
    for (int word = 0; word < f.span_bytes() / 4; ++word, to += 4) {
      const uint32_t value = fragment_word(a.matrix, f, strip, span, word);
      std::memcpy(to, &value, 4);
    }
}

}  // namespace

void pack_fragments(const QuantMatrix& w, const QuantFragments& f, uint8_t* out) {
  const Launch launch = make_launch("pack_fragments", &pack_strip, {w, f, out});
  ThreadPool::get().run(&launch, 1);
}

}  // namespace pyllm

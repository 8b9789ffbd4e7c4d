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
  uint8_t* to = a.out + strip * f.cells() * f.cell_bytes();
  for (int64_t cell = 0; cell < f.cells(); ++cell)
    for (int word = 0; word < f.cell_bytes() / 4; ++word, to += 4) {
      const uint32_t value = fragment_word(a.matrix, f, strip, cell, word);
      std::memcpy(to, &value, 4);
    }
}

}  // namespace

void pack_fragments(const QuantMatrix& w, uint8_t* out) {
  const Launch launch = make_launch("pack_fragments", &pack_strip, {w, fragments_of(w), out});
  ThreadPool::get().run(&launch, 1);
}

}  // namespace pyllm

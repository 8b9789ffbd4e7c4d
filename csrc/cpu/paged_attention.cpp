// The keys and values of a decoding step are read by the kernel in flash_attention.cpp, through the
// page table and, so that all threads have work, one split of the keys a chunk. Here the partial
// results are put together, in the order of the keys and as the other kernel does it for the splits
// that it keeps to itself: the bits are the same.
#include "cpu/attention_row.h"

namespace pyllm::PYLLM_ISA {

void attention_combine(const AttentionCombineArgs& args, int64_t chunk) {
  const AttentionArgs& a = args.attention;
  const int64_t kv_heads = a.k.shape[2], width = a.padded_dim();
  const Sequence s = a.sequence(chunk / kv_heads);
  if (!a.shares_splits(s)) return;
  const Range splits = a.splits(s);
  for (int64_t row = 0; row < s.q_len * a.group; ++row) {
    const int64_t i = row / a.group, head = chunk % kv_heads * a.group + row % a.group;
    const float* first = a.partial(s, i, head, splits.begin);
    alignas(64) float values[kMaxHeadDim];
    for (int64_t c = 0; c < width; c += kLanes) store(values + c, load(first + c));
    float maximum = first[width], sum = first[width + 1];
    for (int64_t split = splits.begin + 1; split < splits.end; ++split) {
      const float* partial = a.partial(s, i, head, split);
      merge(maximum, sum, values, partial[width], partial[width + 1], partial, width);
    }
    finish(a, s, i, head, maximum, sum, values);
  }
}

}  // namespace pyllm::PYLLM_ISA

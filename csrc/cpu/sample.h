#pragma once
#include "core/tensor.h"

namespace pyllm {

// The next token of each row of logits; pyllm/ops/sample.py says exactly which. A null parameter is
// off. Everything is read when the kernel runs. A chunk is a row.
struct SampleArgs {
  Tensor logits;   // float32 [R, V]
  Tensor history;  // int32 [R, L]
  // [R]
  const float *temperature, *top_p, *min_p;
  const float *repetition_penalty, *presence_penalty, *frequency_penalty;
  const int64_t* seed;
  const int32_t *top_k, *position, *prompt_lens, *history_lens;
  int32_t* token;
  float* logprob;
  int64_t chunks() const { return logits.shape[0]; }
};

}  // namespace pyllm

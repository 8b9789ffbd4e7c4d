#pragma once
#include "core/tensor.h"

namespace pyllm::cuda {

// Softmax attention of q over k and v, float16 or bfloat16: [B, S, H, D] with rows on 16 bytes, D a
// multiple of 8 up to 256. A ragged batch is [1, T, H, D] with cu_seqlens. Query i of a sequence
// stands at key p = i + Sk - Sq and sees the keys from p - left to p + right, a side of -1 meaning
// no limit.
struct FlashAttentionArgs {
  Tensor q, k, v, out;
  Tensor bias;                                 // [B, H, Sq, Sk], float, or undefined
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [batch + 1], null: dense
  const float *alibi_slopes, *sinks;           // [H] or null
  float* lse;                                  // [tokens, H] or null
  int batch, left, right;
  float scale, softcap;  // softcap 0: none
};

}  // namespace pyllm::cuda

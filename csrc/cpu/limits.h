#pragma once
#include "core/tensor.h"

namespace pyllm {

// What the machine can do at most, for benchmarks to compare with.

// Reads all of data (uint8) and leaves something that depends on it in sink[chunk].
struct ReadMemoryArgs {
  Tensor data;
  float* sink;
  int64_t bytes_per_chunk;
  int64_t chunks() const { return (data.shape[0] + bytes_per_chunk - 1) / bytes_per_chunk; }
};

enum class Arithmetic { Int8, F32, BF16 };

// The best multiply-add instruction for one kind of number, again and again on registers. Adds how
// many multiplications and additions were done to operations[chunk]; a chunk a thread.
struct PeakArithmeticArgs {
  Arithmetic kind;
  int64_t iterations, threads;
  float* sink;
  int64_t* operations;  // 0 where the instruction set has no such instruction
  int64_t chunks() const { return threads; }
};

}  // namespace pyllm

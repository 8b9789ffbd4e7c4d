// The threads of PyTorch's OpenMP. They spin for milliseconds after each of its operations: with
// threads of our own beside them there would be more threads that compute than processors, and a
// matmul of PyTorch that follows took 1.2 to 1.4 times as long. So single ops run on them.
#pragma once

namespace pyllm {

struct OpenMp {
  void (*parallel)(void (*f)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread)();       // the caller's index within the team
  int (*max_threads)();  // of a team of PyTorch's
};

// Null where the process has none. (GNU's entry point; the runtimes of Intel and LLVM have it too.)
const OpenMp* openmp();

}  // namespace pyllm

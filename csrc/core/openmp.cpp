#include "core/openmp.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace pyllm {

#if defined(__linux__)

namespace {
bool forked = false;  // a child has none of the threads, and OpenMP waits for them forever

template <class F>
void find(F*& function, const char* name) {
  function = reinterpret_cast<F*>(dlsym(RTLD_DEFAULT, name));
}
}  // namespace

const OpenMp* openmp() {
  static const OpenMp found = [] {
    OpenMp o;
    find(o.parallel, "GOMP_parallel");
    find(o.thread, "omp_get_thread_num");
    find(o.max_threads, "omp_get_max_threads");
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    return o;
  }();
  return found.parallel && found.thread && found.max_threads && !forked ? &found : nullptr;
}

#else

const OpenMp* openmp() { return nullptr; }

#endif

}  // namespace pyllm

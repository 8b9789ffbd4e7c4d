#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "core/plan.h"
#include "core/thread_pool.h"

namespace pyllm {
namespace {

void read_memory(Tensor data) {
  Check c("read_memory");
  c(data, "data", "_", {DType::U8}, true);
  c.require(!capturing(), "not while a plan is being captured");
  constexpr int64_t kChunk = 256 * 1024;
  std::vector<float> sink(data.shape[0] / kChunk + 1);
  run(make_launch("read_memory", kernels().read_memory, ReadMemoryArgs{data, sink.data(), kChunk}));
}

// The operations that were done, by all threads together; 0 if there is no instruction for them.
int64_t peak_arithmetic(const std::string& kind, int64_t iterations) {
  Check c("peak_arithmetic");
  c.require(!capturing(), "not while a plan is being captured");
  c.require(kind == "int8" || kind == "float32" || kind == "bfloat16",
            "expected int8, float32 or bfloat16, got '", kind, "'");
  const Arithmetic a = kind == "int8"      ? Arithmetic::Int8
                       : kind == "float32" ? Arithmetic::F32
                                           : Arithmetic::BF16;
  const int64_t threads = ThreadPool::get().size();
  std::vector<float> sink(threads);
  std::vector<int64_t> operations(threads);
  run(make_launch("peak_arithmetic", kernels().peak_arithmetic,
                  PeakArithmeticArgs{a, iterations, threads, sink.data(), operations.data()}));
  int64_t sum = 0;
  for (int64_t n : operations) sum += n;
  return sum;
}

}  // namespace

void register_limits(py::module_& m) {
  m.def("read_memory", &read_memory);
  m.def("peak_arithmetic", &peak_arithmetic);
}

}  // namespace pyllm

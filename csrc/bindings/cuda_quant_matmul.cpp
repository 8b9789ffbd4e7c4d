#include "bindings/device_library.h"
#include "bindings/quant_matrix.h"

namespace pyllm {
namespace {

// The floats of scratch that cuda_quant_matmul needs.
int64_t quant_matmul_scratch(int64_t rows, int64_t n, int64_t k, int group_size,
                             int multiprocessors) {
  const QuantFragments w{n, k, 4, group_size, false};
  return cuda::QuantMatmulPlan::of(w, multiprocessors).partial_size(rows, w);
}

void cuda_quant_matmul(DeviceLibrary& library, DeviceTensor x, DeviceTensor packed, int64_t n,
                       int64_t k, int bits, int group_size, bool has_minimum, DeviceTensor bias,
                       DeviceTensor y, int multiprocessors, DeviceTensor partial,
                       DeviceTensor arrived, uintptr_t stream) {
  using Plan = cuda::QuantMatmulPlan;
  Check c("quant_matmul");
  const QuantFragments w = quant_fragments(c, n, k, bits, group_size, has_minimum);
  check_bytes(c, packed, w.bytes());
  c(x, "x", "T K", {DType::F16, DType::BF16});
  c.require(x.shape[1] == k, "x: expected [T, ", k, "], got ", x);
  c(y, "out", "T N", {x.dtype, DType::F32});
  c.require(y.shape[1] == n, "out: expected [T, ", n, "], got ", y);
  c.optional(bias, "bias", "N", {DType::F32});
  if (y.numel() == 0) return;
  c.require(
      reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.shape[0] == 1 || x.stride[0] % 8 == 0),
      "x: expected rows aligned to 16 bytes, got ", x);
  c.require(reinterpret_cast<uintptr_t>(packed.data) % 16 == 0,
            "weight: expected packed bytes aligned to 16, got ", packed);
  c.require(multiprocessors > 0 && multiprocessors < 65536, "expected a count of multiprocessors");
  const Plan plan = Plan::of(w, multiprocessors);
  c.require(plan.fits(), "weight: expected fewer than 2^23 rows and 2^44 values, got [", n, ", ", k,
            "]");
  c(partial, "partial", "_", {DType::F32}, true);
  c.require(partial.shape[0] >= plan.partial_size(x.shape[0], w), "partial: expected more scratch");
  c(arrived, "arrived", "_", {DType::I32}, true);
  c.require(arrived.shape[0] >= plan.tiles, "arrived: expected a counter a tile");
  library.run(&cuda::Kernels::quant_matmul,
              {x, bias, y, partial, arrived, packed.as<const uint8_t>(), w, plan}, stream,
              {{"x", x},
               {"weight", packed},
               {"bias", bias},
               {"out", y},
               {"partial", partial},
               {"arrived", arrived}});
}

void cuda_pack_fragments(DeviceLibrary& library, DeviceTensor packed, int64_t n, int64_t k,
                         int bits, int packed_group_size, bool has_minimum, int group_size,
                         DeviceTensor out, uintptr_t stream) {
  Check c("pack_fragments");
  const QuantMatrix w = quant_matrix(c, packed, n, k, bits, packed_group_size, has_minimum);
  const QuantFragments f = quant_fragments(c, n, k, bits, group_size, has_minimum);
  check_bytes(c, out, f.bytes());
  c.require(f.bytes() / 16 / 128 < int64_t{1} << 31, "weight: expected at most 2^42 bytes");
  library.run(&cuda::Kernels::pack_fragments, {w, f, out}, stream,
              {{"weight", packed}, {"out", out}});
}

cuda::QuantRowsPlan rows_plan(int64_t rows, int64_t n, int64_t k, int multiprocessors) {
  using Plan = cuda::QuantRowsPlan;
  return Plan::of(std::min(rows, Plan::most_rows(n)), n, k, multiprocessors);
}

// The words of scratch that cuda_quant_rows_matmul needs.
int64_t quant_rows_matmul_scratch(int64_t rows, int64_t n, int64_t k, int multiprocessors) {
  return n > 0 && n < 1 << 23 ? rows_plan(rows, n, k, multiprocessors).partial_size() : 0;
}

void cuda_quant_rows_matmul(DeviceLibrary& library, DeviceTensor x, DeviceTensor x_scale,
                            DeviceTensor w, DeviceTensor w_scale, DeviceTensor bias, DeviceTensor y,
                            int multiprocessors, DeviceTensor partial, DeviceTensor arrived,
                            uintptr_t stream) {
  Check c("quant_matmul");
  c(x, "x", "T K", {DType::I8});
  c(x_scale, "x.scale", "T", {DType::F32});
  c(w, "weight", "N K", {DType::I8});
  c(w_scale, "weight.scale", "N", {DType::F32});
  c.optional(bias, "bias", "N", {DType::F32});
  c(y, "out", "T N", kFloats);
  if (y.numel() == 0) return;
  const int64_t k = c.dim("K"), n = c.dim("N");
  c.require(k > 0 && k % 16 == 0 && k < 1 << 17,
            "x: expected K to be a multiple of 16 and below 2^17 (a sum of int8 products must fit "
            "int32), got ",
            x);
  c.require(n < 1 << 23, "weight: expected fewer than 2^23 rows, got ", w);
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"x", x}, {"weight", w}})
    c.require(
        reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && (t.shape[0] == 1 || t.stride[0] % 16 == 0),
        name, ": expected rows aligned to 16 bytes, got ", t);
  c.require(multiprocessors > 0 && multiprocessors < 65536, "expected a count of multiprocessors");
  c(partial, "partial", "_", {DType::I32}, true);
  c.require(partial.shape[0] >= rows_plan(c.dim("T"), n, k, multiprocessors).partial_size(),
            "partial: expected more scratch");
  c(arrived, "arrived", "_", {DType::I32}, true);
  c.require(arrived.shape[0] >= cuda::QuantRowsPlan::kMaxTiles,
            "arrived: expected a counter a tile");
  library.run(&cuda::Kernels::quant_rows_matmul,
              {x, x_scale, w, w_scale, bias, y, partial, arrived, multiprocessors}, stream,
              {{"x", x},
               {"x.scale", x_scale},
               {"weight", w},
               {"weight.scale", w_scale},
               {"bias", bias},
               {"out", y},
               {"partial", partial},
               {"arrived", arrived}});
}

}  // namespace

void register_cuda_quant_matmul(DeviceLibraryClass& c) {
  c.def("quant_matmul", &cuda_quant_matmul)
      .def("pack_fragments", &cuda_pack_fragments)
      .def("quant_rows_matmul", &cuda_quant_rows_matmul)
      .def_static("quant_matmul_scratch", &quant_matmul_scratch)
      .def_static("quant_rows_matmul_scratch", &quant_rows_matmul_scratch);
}

}  // namespace pyllm

#include "bindings/cuda_attention.h"

namespace pyllm {
namespace {

void cuda_flash_attention(DeviceLibrary& library, DeviceTensor q, DeviceTensor k, DeviceTensor v,
                          DeviceTensor cu_seqlens_q, DeviceTensor cu_seqlens_k, float scale,
                          int left, int right, float softcap, DeviceTensor alibi_slopes,
                          DeviceTensor bias, DeviceTensor sinks, DeviceTensor out, DeviceTensor lse,
                          uintptr_t stream) {
  Check c("flash_attention");
  const bool ragged = cu_seqlens_q.defined();
  const auto sizes = [&](const char* dense, const char* packed) { return ragged ? packed : dense; };
  c(q, "q", sizes("B Sq H D", "Tq H D"), {DType::F16, DType::BF16});
  c(k, "k", sizes("B Sk Hkv D", "Tk Hkv D"), {q.dtype});
  c(v, "v", sizes("B Sk Hkv D", "Tk Hkv D"), {q.dtype});
  c(out, "out", sizes("B Sq H D", "Tq H D"), {q.dtype});
  c.optional(lse, "lse", sizes("B Sq H", "Tq H"), {DType::F32}, /*contiguous=*/true);
  c.require(ragged == cu_seqlens_k.defined(), "cu_seqlens_q and cu_seqlens_k come together");
  cuda::FlashAttentionArgs a{};
  if (ragged) {
    c(cu_seqlens_q, "cu_seqlens_q", "B+1", {DType::I32});
    c(cu_seqlens_k, "cu_seqlens_k", "B+1", {DType::I32});
    c.require(c.dim("B+1") >= 1, "cu_seqlens_q: expected at least one entry, got none");
    c.require(!bias.defined(), "bias: expected none with cu_seqlens, only a dense batch takes one");
    a.batch = static_cast<int>(c.dim("B+1") - 1);
    q = {as_batch(q)}, k = {as_batch(k)}, v = {as_batch(v)}, out = {as_batch(out)};
  } else {
    c.optional(bias, "bias", "B H Sq Sk", kFloats);
    a.batch = static_cast<int>(std::min<int64_t>(c.dim("B"), INT32_MAX));
  }
  const AttentionOptions options{scale, softcap, alibi_slopes, sinks};
  check_cuda_attention(c, options, {{"q", q}, {"k", k}, {"v", v}, {"out", out}});
  if (a.batch == 0 || q.numel() == 0) return;
  a.q = q, a.k = k, a.v = v, a.out = out, a.bias = bias;
  a.cu_seqlens_q = cu_seqlens_q.as<int32_t>();
  a.cu_seqlens_k = cu_seqlens_k.as<int32_t>();
  a.lse = lse.as<float>();
  a.left = left, a.right = right;
  fill_options(a, options);
  library.run(&cuda::Kernels::flash_attention, a, stream,
              {{"q", q},
               {"k", k},
               {"v", v},
               {"cu_seqlens_q", cu_seqlens_q},
               {"cu_seqlens_k", cu_seqlens_k},
               {"alibi_slopes", alibi_slopes},
               {"bias", bias},
               {"sinks", sinks},
               {"out", out},
               {"lse", lse}});
}

}  // namespace

void register_cuda_flash_attention(DeviceLibraryClass& c) {
  c.def("flash_attention", &cuda_flash_attention);
}

}  // namespace pyllm

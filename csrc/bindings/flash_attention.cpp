#include <cmath>

#include "bindings/attention.h"
#include "bindings/batch_checks.h"

namespace pyllm {
namespace {

py::object flash_attention(py::handle q_object, Tensor k, Tensor v, Tensor cu_seqlens_q,
                           Tensor cu_seqlens_k, float scale, int64_t left, int64_t right,
                           float softcap, Tensor alibi_slopes, Tensor bias, Tensor sinks,
                           py::handle out_object, Tensor lse) {
  Tensor q = tensor_from_python(q_object);
  Check c("flash_attention");
  AttentionArgs a{};
  const bool ragged = cu_seqlens_q.defined();
  const auto sizes = [&](const char* dense, const char* packed) { return ragged ? packed : dense; };
  c(q, "q", sizes("B Sq H D", "Tq H D"), kFloats);
  c(k, "k", sizes("B Sk Hkv D", "Tk Hkv D"), kFloats);
  c(v, "v", sizes("B Sk Hkv D", "Tk Hkv D"), {k.dtype});
  const Output output = output_like(out_object, q_object, q);
  Tensor out = output.tensor;
  c(out, "out", sizes("B Sq H D", "Tq H D"), {q.dtype});
  c.optional(lse, "lse", sizes("B Sq H", "Tq H"), {DType::F32}, /*contiguous=*/true);
  c.require(ragged == cu_seqlens_k.defined(), "cu_seqlens_q and cu_seqlens_k come together");
  if (ragged) {
    c(cu_seqlens_q, "cu_seqlens_q", "B+1", {DType::I32});
    c(cu_seqlens_k, "cu_seqlens_k", "B+1", {DType::I32});
    c.require(c.dim("B+1") >= 1, "cu_seqlens_q: expected at least one entry, got none");
    c.require(!bias.defined(), "bias: expected none with cu_seqlens, only a dense batch takes one");
    if (!capturing()) {
      check_cu_seqlens(c, cu_seqlens_q, "cu_seqlens_q", c.dim("Tq"));
      check_cu_seqlens(c, cu_seqlens_k, "cu_seqlens_k", c.dim("Tk"));
    }
    a.batch = c.dim("B+1") - 1;
    q = as_batch(q), k = as_batch(k), v = as_batch(v), out = as_batch(out);
  } else {
    c.optional(bias, "bias", "B H Sq Sk", kFloats);
    a.batch = c.dim("B");
    a.max_splits = max_splits(c.dim("Sk"));
  }
  a.q = q, a.k = k, a.v = v, a.out = out, a.bias = bias;
  a.cu_seqlens_q = cu_seqlens_q.as<int32_t>();
  a.cu_seqlens_k = cu_seqlens_k.as<int32_t>();
  a.lse = lse.as<float>();
  a.left = left;
  a.right = right;
  run_attention(c, "flash_attention", a, k.shape[1], {scale, softcap, alibi_slopes, sinks});
  return output.object;
}

// [B, H, S, D] as [B, S, H, D].
Tensor heads_inside(Tensor t) {
  std::swap(t.shape[1], t.shape[2]);
  std::swap(t.stride[1], t.stride[2]);
  return t;
}

// A mask of two to four dimensions as [B, H, L, S] without a copy; false if it is not that.
bool expand_mask(Tensor mask, const Tensor& q, int64_t keys, Tensor& bias) {
  const int64_t shape[] = {q.shape[0], q.shape[1], q.shape[2], keys};
  if (mask.ndim < 2 ||
      (mask.dtype != DType::Bool && mask.dtype != DType::F32 && mask.dtype != q.dtype))
    return false;
  bias = mask;
  bias.ndim = 4;
  for (int i = 3, from = mask.ndim - 1; i >= 0; --i, --from) {
    bias.shape[i] = shape[i];
    bias.stride[i] = 0;
    if (from < 0 || (mask.shape[from] == 1 && i < 3)) continue;
    if (mask.shape[from] != shape[i]) return false;
    bias.stride[i] = mask.stride[from];
  }
  return keys == 1 || bias.stride[3] == 1;
}

// Whether these are [B, H, S, D] as the kernel takes them.
bool are_plain(const Tensor& q, const Tensor& k, const Tensor& v, bool enable_gqa) {
  for (const Tensor* t : {&q, &k, &v})
    if (t->ndim != 4 || t->dtype != q.dtype || t->shape[0] != q.shape[0] || t->numel() == 0 ||
        t->shape[3] != q.shape[3] || (t->stride[3] != 1 && t->shape[3] != 1))
      return false;
  return std::find(kFloats.begin(), kFloats.end(), q.dtype) != kFloats.end() &&
         std::equal(k.shape, k.shape + 4, v.shape) && q.shape[3] <= kMaxHeadDim &&
         (q.shape[1] == k.shape[1] || (enable_gqa && q.shape[1] % k.shape[1] == 0));
}

// PyTorch's function of this name for what most calls are: four dimensions, nothing to broadcast
// but a mask. None for anything else, and for what is wrong: whoever asked then looks closer.
py::object scaled_dot_product_attention(py::handle query, py::handle key, py::handle value,
                                        py::handle mask, bool is_causal, py::handle scale,
                                        bool enable_gqa) {
  Tensor q, k, v, given, bias;
  try {
    q = tensor_from_python(query), k = tensor_from_python(key), v = tensor_from_python(value);
    if (!mask.is_none()) given = tensor_from_python(mask);
  } catch (py::error_already_set&) {
    return py::none();
  } catch (py::type_error&) {
    return py::none();
  }
  if (!are_plain(q, k, v, enable_gqa)) return py::none();
  if (given.defined() && !expand_mask(given, q, k.shape[2], bias)) return py::none();
  Check c("scaled_dot_product_attention");
  AttentionArgs a{};
  a.left = a.right = -1;
  if (is_causal && k.shape[2] >= q.shape[2]) {  // the keys after the last query nobody sees
    k.shape[2] = v.shape[2] = q.shape[2];
    if (bias.defined()) bias.shape[3] = q.shape[2];
    a.right = 0;
  } else if (is_causal) {  // the last queries see all
    a.right = q.shape[2] - k.shape[2];
  }
  a.q = heads_inside(q), a.k = heads_inside(k), a.v = heads_inside(v), a.bias = bias;
  // A result that lies as [B, S, H, D]. Of a query that lies so, it has the query's shape at once.
  const bool one = q.shape[1] == 1 || q.shape[2] == 1;
  const Output output = output_like(py::none(), query, one ? q : a.q);
  const bool inside = !one && output.tensor.stride[1] > output.tensor.stride[2];
  a.out = inside ? output.tensor : heads_inside(output.tensor);
  c(a.q, "query", "B Sq H D", {q.dtype});
  c(a.k, "key", "B Sk Hkv D", {q.dtype});
  c(a.v, "value", "B Sk Hkv D", {q.dtype});
  a.batch = q.shape[0];
  a.max_splits = max_splits(k.shape[2]);
  const double d = static_cast<double>(q.shape[3]);
  const float factor = scale.is_none() ? static_cast<float>(std::pow(d, -0.5))
                                       : fast_call::from_python<float>(scale.ptr());
  run_attention(c, "flash_attention", a, k.shape[2], {factor, 0.0f, {}, {}});
  if (!inside) return output.object;
  static PyObject* const name = PyUnicode_InternFromString("transpose");
  static PyObject *const first = PyLong_FromLong(1), *const second = PyLong_FromLong(2);
  PyObject* arguments[] = {output.object.ptr(), first, second};
  return owned(PyObject_VectorcallMethod(name, arguments, std::size(arguments), nullptr));
}

}  // namespace

void register_flash_attention(py::module_& m) {
  def_fast<&flash_attention>(m, "flash_attention");
  def_fast<&scaled_dot_product_attention>(m, "scaled_dot_product_attention");
}

}  // namespace pyllm

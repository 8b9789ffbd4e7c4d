#include "bindings/bindings.h"

namespace pyllm {
namespace {

void sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p,
            Tensor repetition_penalty, Tensor presence_penalty, Tensor frequency_penalty,
            Tensor seed, Tensor position, Tensor history, Tensor prompt_lens, Tensor history_lens,
            Tensor token, Tensor logprob) {
  Check c("sample");
  c(logits, "logits", "R V", {DType::F32});
  c.require(logits.shape[1] > 0 && logits.shape[1] <= INT32_MAX,
            "logits: expected 1 to 2^31 - 1 tokens, got ", logits.shape[1]);
  c.optional(temperature, "temperature", "R", {DType::F32});
  c.optional(top_k, "top_k", "R", {DType::I32});
  c.optional(top_p, "top_p", "R", {DType::F32});
  c.optional(min_p, "min_p", "R", {DType::F32});
  c.optional(repetition_penalty, "repetition_penalty", "R", {DType::F32});
  c.optional(presence_penalty, "presence_penalty", "R", {DType::F32});
  c.optional(frequency_penalty, "frequency_penalty", "R", {DType::F32});
  c.optional(seed, "seed", "R", {DType::I64});
  c.optional(position, "position", "R", {DType::I32});
  c.optional(history, "history", "R L", {DType::I32});
  c.optional(prompt_lens, "prompt_lens", "R", {DType::I32});
  c.optional(history_lens, "history_lens", "R", {DType::I32});
  c.require(
      history.defined() == prompt_lens.defined() && history.defined() == history_lens.defined(),
      "history, prompt_lens and history_lens come together");
  const bool penalties =
      repetition_penalty.defined() || presence_penalty.defined() || frequency_penalty.defined();
  c.require(!penalties || history.defined(),
            "penalties need history, prompt_lens and history_lens");
  c(token, "token", "R", {DType::I32});
  c.optional(logprob, "logprob", "R", {DType::F32});
  if (logits.shape[0] == 0) return;
  SampleArgs args{.logits = logits,
                  .history = penalties ? history : Tensor{},
                  .temperature = temperature.as<float>(),
                  .top_p = top_p.as<float>(),
                  .min_p = min_p.as<float>(),
                  .repetition_penalty = repetition_penalty.as<float>(),
                  .presence_penalty = presence_penalty.as<float>(),
                  .frequency_penalty = frequency_penalty.as<float>(),
                  .seed = seed.as<int64_t>(),
                  .top_k = top_k.as<int32_t>(),
                  .position = position.as<int32_t>(),
                  .prompt_lens = prompt_lens.as<int32_t>(),
                  .history_lens = history_lens.as<int32_t>(),
                  .token = token.as<int32_t>(),
                  .logprob = logprob.as<float>()};
  run(make_launch("sample", kernels().sample, args));
}

}  // namespace

void register_sample(py::module_& m) { m.def("sample", &sample); }

}  // namespace pyllm

"""`rope_cache`, `paged_attention` and `sample`, which have no derivative."""

import torch

from pyllm.ops.library.define import define, implementation, into, named


def rope_cache(
    q, k, v, cos_sin, positions, k_cache, v_cache, cu_seqlens_q, page_table, interleaved, out,
    backend,
):  # fmt: skip
    """As the op's backends are called."""
    y = _rope_cache(
        q, k, v, cos_sin, positions, k_cache, v_cache, cu_seqlens_q, page_table, interleaved,
        named(backend),
    )  # fmt: skip
    return into("rope_cache", out, y, q)


def paged_attention(q, *arguments, backend):
    """As the op's backends are called."""
    *arguments, sides, softcap, alibi_slopes, sinks, k_scale, v_scale, out = arguments
    *tensors, scale = arguments
    y = _paged_attention(
        q, *tensors, alibi_slopes, sinks, k_scale, v_scale, scale, *sides, softcap or 0.0,
        named(backend),
    )  # fmt: skip
    return into("paged_attention", out, y, q)


def sample(logits, parameters, logprobs, out, backend):
    """As the public function's arguments are, `parameters` in their order."""
    token, logprob = _sample(logits, *parameters, logprobs, named(backend))
    if out is not None:
        token = out[0].copy_(token)
        logprob = out[1].copy_(logprob) if logprobs else None
    return token, logprob if logprobs else None


def _run_rope_cache(*arguments):
    *arguments, backend = arguments
    return implementation("rope_cache", arguments[0], backend)(*arguments, None)


def _fake_like(q, *_):
    return q.new_empty(q.shape)


def _run_paged(
    q, k_cache, v_cache, cu_seqlens_q, page_table, context_lens, alibi_slopes, sinks, k_scale,
    v_scale, scale, left, right, softcap, backend,
):  # fmt: skip
    return implementation("paged_attention", q, backend)(
        q, k_cache, v_cache, cu_seqlens_q, page_table, context_lens, scale, (left, right), softcap,
        alibi_slopes, sinks, k_scale, v_scale, None,
    ).contiguous()  # fmt: skip


def _run_sample(logits, *arguments):
    *parameters, logprobs, backend = arguments
    token, logprob = _fake_sample(logits, *arguments)
    function = implementation("sample", logits, backend)
    function(logits, *parameters, token, logprob if logprobs else None)
    return token, logprob


def _fake_sample(logits, *arguments):
    rows = logits.shape[0]
    logprobs = rows if arguments[-2] else 0
    return (
        logits.new_empty(rows, dtype=torch.int32),
        logits.new_empty(logprobs, dtype=torch.float32),
    )


_rope_cache = define(
    "rope_cache(Tensor q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cu_seqlens_q, Tensor page_table, "
    "bool interleaved, str? backend) -> Tensor",
    _run_rope_cache, _fake_like,
)  # fmt: skip
_paged_attention = define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, "
    "Tensor page_table, Tensor context_lens, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor? k_scale, Tensor? v_scale, float scale, SymInt left, SymInt right, float softcap, "
    "str? backend) -> Tensor",
    _run_paged, _fake_like,
)  # fmt: skip
_sample = define(
    "sample(Tensor logits, Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, "
    "Tensor? repetition_penalty, Tensor? presence_penalty, Tensor? frequency_penalty, "
    "Tensor? seed, Tensor? position, Tensor? history, Tensor? prompt_lens, Tensor? history_lens, "
    "bool logprobs, str? backend) -> (Tensor, Tensor)",
    _run_sample, _fake_sample,
)  # fmt: skip

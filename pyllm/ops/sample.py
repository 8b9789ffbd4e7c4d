"""The next token of each row of logits.

What happens to a row, in this order; each step may be off:

1. Repetition penalty over prompt and generated tokens (Keskar et al., 2019, arXiv:1909.05858): the
   logit of a token that occurs is divided by the penalty, or multiplied if it is negative.
2. Frequency and presence penalties over the generated tokens, as in OpenAI's API:
   ``logit - count * frequency - (count > 0) * presence``.
3. Temperature 0 (or less, or NaN) takes the highest logit, the lowest token id of equal ones, and
   ends here. Otherwise token i gets the weight
   ``floor(2³⁰ exp((logit_i - highest) / temperature))``.
4. Top-k keeps the k highest; of equal logits the lower ids come first.
5. Top-p (Holtzman et al., 2019, arXiv:1904.09751): in the same order, a token is kept while the
   weights before it sum to less than p of the total, rounded up. The first is always kept.
6. Min-p (Nguyen et al., 2024, arXiv:2407.01082) keeps the weights of at least ``2³⁰ min(p, 1)``.
7. One number u, uniform in [0, 2⁶⁴), is drawn: the first two words of Philox4x32-10 (Salmon et al.,
   2011, doi:10.1145/2063384.2063405), low word first, with the seed as key and the counter
   ``(position, 0, 0, 0)``. The token is the first one, by id, at which the running sum of the kept
   weights exceeds ``u * total >> 64``.

Weights are integers so that their sums are exact in any order. A token 2³⁰ times less probable than
the first is never drawn. So a row's token depends on its own logits, parameters, seed and position.

A logit that is NaN counts as -inf. A row without any logit above -inf gives token 0.
"""

import math

import torch

from pyllm import _C
from pyllm.ops import device, library
from pyllm.ops.alloc import empty
from pyllm.ops.registry import Op, dispatches

_OP = Op("sample")


def sample(
    logits,
    *,
    temperature=None,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=None,
    presence_penalty=None,
    frequency_penalty=None,
    seed=None,
    position=None,
    history=None,
    prompt_lens=None,
    history_lens=None,
    logprobs=True,
    out=None,
    backend=None,
):
    """Chooses a token for each of R rows of logits; the module's docstring says how.

    Every parameter is a tensor ``[R]``, float32 unless said otherwise, or None where it is off for
    all rows. They are read when the op runs, so a captured step may change them.

    Args:
        logits: float32 ``[R, V]``, the last dimension contiguous.
        temperature: 0 (or None) is greedy.
        top_k: int32; 0 or at least V is off.
        top_p: 1 or more is off.
        min_p: 0 is off.
        repetition_penalty: 1 is off.
        presence_penalty, frequency_penalty: 0 is off.
        seed: int64, the generator's key; None is 0.
        position: int32, the generator's counter: another one for every token of a sequence.
        history: int32 ``[R, L]``: the prompt of each row, then what was generated. Ids outside the
            vocabulary are ignored. Needed for penalties, with `prompt_lens` and `history_lens`.
        prompt_lens, history_lens: int32; where the prompt ends and where the history ends, at most
            L. They are clamped to ``0 <= prompt_lens <= history_lens <= L``.
        logprobs: whether to compute log-probabilities; without them greedy is much cheaper.
        out: a pair like what is returned.

    Returns:
        ``(token, logprob)``: int32 ``[R]``, and float32 ``[R]`` or None: the log-softmax of the raw
        logits at the token.

    Raises:
        ValueError: for shapes or dtypes that do not fit together.
        BackendError: if `backend` cannot serve.
    """
    if dispatches(logits):
        parameters = (
            temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
            frequency_penalty, seed, position, history, prompt_lens, history_lens,
        )  # fmt: skip
        return library.sample(logits, parameters, logprobs, out, backend)
    implementation = _OP.implementation(logits, backend)
    if out is None:
        rows = logits.shape[:1]
        out = (
            empty(rows, torch.int32, logits.device),
            empty(rows, torch.float32, logits.device) if logprobs else None,
        )
    elif not logprobs:
        out = (out[0], None)
    implementation(
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        seed,
        position,
        history,
        prompt_lens,
        history_lens,
        *out,
    )
    return out


_OP.register("cpu")(_C.sample)


@_OP.register("triton")
def _triton(
    logits, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
    frequency_penalty, seed, position, history, prompt_lens, history_lens, token, logprob,
):  # fmt: skip
    floats = {
        "temperature": temperature, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }  # fmt: skip
    ints = {
        "top_k": top_k, "position": position, "prompt_lens": prompt_lens,
        "history_lens": history_lens, "token": token,
    }  # fmt: skip
    others = {"seed": seed, "history": history, "logprob": logprob}
    device.check_same("sample", logits, **floats, **ints, **others)
    _C.check("sample", [
        (logits, "logits", "R V", torch.float32),
        *((x, name, "R", torch.float32) for name, x in floats.items()),
        *((x, name, "R", torch.int32) for name, x in ints.items()),
        (seed, "seed", "R", torch.int64), (history, "history", "R L", torch.int32),
        (logprob, "logprob", "R", torch.float32),
    ])  # fmt: skip
    if logits.shape[1] == 0:
        raise ValueError("sample: logits: expected 1 to 2^31 - 1 tokens, got 0")
    if len({x is None for x in (history, prompt_lens, history_lens)}) > 1:
        raise ValueError("sample: history, prompt_lens and history_lens come together")
    penalties = (repetition_penalty, presence_penalty, frequency_penalty)
    if history is None and any(p is not None for p in penalties):
        raise ValueError("sample: penalties need history, prompt_lens and history_lens")
    device.triton_kernels("sample").sample(
        logits, temperature, top_k, top_p, min_p, *penalties, seed, position, history, prompt_lens,
        history_lens, token, logprob, lambda shape, dtype: empty(shape, dtype, logits.device),
    )  # fmt: skip


def philox4x32(counter, key):
    """Philox4x32-10: four 32-bit words from a counter of four and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            p1 >> 32 ^ c1 ^ k0,
            p1 & 0xFFFFFFFF,
            p0 >> 32 ^ c3 ^ k1,
            p0 & 0xFFFFFFFF,
        )
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


def penalized(logits, history, prompt_len, repetition=1.0, presence=0.0, frequency=0.0):
    """Steps 1 and 2 for one row of logits and its list of tokens."""
    scores, n = logits.clone(), len(logits)
    seen = torch.tensor([h for h in set(history) if 0 <= h < n], dtype=torch.long)
    scores[seen] = torch.where(
        scores[seen] < 0, scores[seen] * repetition, scores[seen] / repetition
    )
    generated = torch.tensor([h for h in history[prompt_len:] if 0 <= h < n], dtype=torch.long)
    counts = torch.bincount(generated, minlength=n)
    applied = scores - counts * frequency - (counts > 0) * presence
    return torch.where(counts > 0, applied, scores)


def kept_weights(scores, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Steps 3 to 6 for one row of penalized logits: int64 ``[V]``, 0 for what is not kept."""
    highest = scores.max()
    gap = torch.where(scores == highest, 0.0, scores.double() - highest.double())
    temperature = min(temperature, torch.finfo(torch.float32).max)  # inf / inf is no weight
    weights = (2.0**30 * torch.exp(gap / temperature)).floor().long()
    order = torch.sort(scores, descending=True, stable=True).indices
    if 0 < top_k < len(scores):
        weights[order[top_k:]] = 0
    if top_p < 1:
        before = weights[order].cumsum(0) - weights[order]
        limit = max(1, math.ceil(max(top_p, 0.0) * weights.sum().item()))
        weights[order[before >= limit]] = 0
    if min_p > 0:
        weights[weights < 2**30 * min(min_p, 1.0)] = 0
    return weights


def _token(logits, history, prompt_len, penalties, temperature, filters, seed, position):
    scores = torch.where(logits.isnan(), -torch.inf, logits)
    scores = penalized(scores, history, prompt_len, *penalties)
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    if scores.max() == -torch.inf:
        return 0
    if not temperature > 0:
        return int((scores == scores.max()).nonzero()[0])
    weights = kept_weights(scores, temperature, *filters)
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    low, high, _, _ = philox4x32((position & 0xFFFFFFFF, 0, 0, 0), key)
    drawn = (high << 32 | low) * int(weights.sum()) >> 64
    return int((weights.cumsum(0) > drawn).nonzero()[0])


@_OP.register("reference")
def _reference(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    repetition_penalty,
    presence_penalty,
    frequency_penalty,
    seed,
    position,
    history,
    prompt_lens,
    history_lens,
    token,
    logprob,
):
    def at(parameter, row, off):
        return off if parameter is None else parameter[row].item()

    for r, row in enumerate(logits):
        end = max(0, at(history_lens, r, 0))
        past = [] if history is None else history[r, :end].tolist()
        prompt = min(max(0, at(prompt_lens, r, 0)), len(past))
        penalties = (
            at(repetition_penalty, r, 1.0),
            at(presence_penalty, r, 0.0),
            at(frequency_penalty, r, 0.0),
        )
        filters = at(top_k, r, 0), at(top_p, r, 1.0), at(min_p, r, 0.0)
        heat = at(temperature, r, 0.0)
        chosen = _token(
            row, past, prompt, penalties, heat, filters, at(seed, r, 0), at(position, r, 0)
        )
        token[r] = chosen
        if logprob is not None:
            clean = torch.where(row.isnan(), -torch.inf, row).double()
            exact = torch.log_softmax(clean, -1)[chosen]
            logprob[r] = -torch.inf if clean[chosen] == -torch.inf else exact

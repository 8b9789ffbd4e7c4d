"""Models of Hugging Face transformers as they are and after `pyllm.patch`, taking turns.

MiniLM makes sentences of mixed lengths into vectors as sentence-embedding code does, and SmolLM2
writes text with `generate`, both in float32 and both with their real weights. All ways of a case
share the parameters; before it is timed, a way has to give what the model gave before.
"""

import copy
import importlib.util
import random
import statistics
import time

import torch
import torch.nn.functional as F
from rich.table import Table

from pyllm import _C
from pyllm.loading import resolve

from .perplexity import TEXT

N_SENTENCES = 64
WORDS = (2, 95)  # of a sentence: 4 to about 120 tokens
PROMPT, NEW = 32, 48  # tokens of a prompt and of what is written
# What is passed to `pyllm.patch`; None: the model as it is.
WAYS = {
    "minilm": {"unpatched": None, "patched": {}},
    "smollm2": {
        "unpatched": None, "patched": {}, "patched, int8": {"linear": "int8"},
        "patched, int4": {"linear": "int4"},
    },
    "prompt": {
        "unpatched": None, "patched": {}, "patched, int8": {"linear": "int8"},
    },
}  # fmt: skip


def sentences(n=N_SENTENCES, seed=0) -> list[str]:
    """Pieces of real English text of mixed lengths, evenly spread over `WORDS`."""
    words, draw = TEXT.read_text(encoding="utf-8").split(), random.Random(seed)
    pieces = []
    for _ in range(n):
        length = draw.randint(*WORDS)
        begin = draw.randrange(len(words) - length)
        pieces.append(" ".join(words[begin : begin + length]))
    return pieces


class MiniLM:
    """Sentences per second."""

    what, unit, n = f"MiniLM, {N_SENTENCES} sentences", "sentences/s", N_SENTENCES

    def __init__(self):
        import transformers

        path = resolve("all-minilm-l6-v2")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.model = transformers.AutoModel.from_pretrained(path).eval()
        self.sentences = sentences()

    def run(self, model):
        inputs = self.tokenizer(self.sentences, padding=True, return_tensors="pt")
        hidden, seen = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        return F.normalize((hidden * seen).sum(1) / seen.sum(1), dim=1)

    def check(self, way, result, before):
        cosine = (result * before).sum(1).min().item()
        if cosine < 1 - 1e-5:
            raise AssertionError(f"{way}: a sentence's vector turned, cosine {cosine:.6f}")


class SmolLM2:
    """Tokens per second of `generate`, the prompt's time included."""

    what, unit, n = f"SmolLM2-135M, {PROMPT} + {NEW} tokens", "tokens/s", NEW

    def __init__(self):
        from .huggingface import hf_from_gguf

        self.model = hf_from_gguf(resolve("smollm2-135m"))
        torch.manual_seed(0)
        self.prompt = torch.randint(1000, 40000, (1, PROMPT))

    def run(self, model):
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        mask = torch.ones_like(self.prompt)
        return model.generate(self.prompt, attention_mask=mask, pad_token_id=0, **options)[0]

    def check(self, way, result, before):
        if "int" not in way and not torch.equal(result, before):
            raise AssertionError(f"{way}: other tokens than before")


class Prompt(SmolLM2):
    """Tokens per second of a prompt, nothing written after it."""

    n = 512
    what = f"SmolLM2-135M, a prompt of {n} tokens"

    def __init__(self):
        super().__init__()
        self.prompt = torch.randint(1000, 40000, (1, self.n))

    def run(self, model):
        return model(self.prompt, use_cache=False, logits_to_keep=1).logits

    def check(self, way, result, before):
        if "int" not in way:
            torch.testing.assert_close(result, before, rtol=1e-3, atol=1e-3)


CASES = {"minilm": MiniLM, "smollm2": SmolLM2, "prompt": Prompt}
NEEDED = ("transformers", "gguf")


def missing() -> list[str]:
    """What has to be installed before anything can be measured."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


@torch.inference_mode()
def measure(*, threads, rounds=7, cases=None, progress=lambda text: None) -> dict:
    """Times all ways of each case in rounds, after one to warm up.

    Args:
        cases: only these, of `CASES`.
    """
    import pyllm

    if unknown := set(cases or ()) - set(CASES):
        raise ValueError(f"case: expected {', '.join(CASES)}, got {', '.join(sorted(unknown))}")
    if names := missing():
        raise ModuleNotFoundError(f"install {' and '.join(names)} to measure drop_in")
    before = torch.get_num_threads(), _C.num_threads()
    torch.set_num_threads(threads)
    _C.set_num_threads(threads)
    rows = []
    try:
        for name in cases or CASES:
            progress(name)
            case = CASES[name]()
            parameters = {id(p): p for p in case.model.parameters()}
            models = {}
            for way, options in WAYS[name].items():
                models[way] = copy.deepcopy(case.model, dict(parameters))
                if options is not None:
                    pyllm.patch(models[way], **options)
            rows += _rows(case, models, rounds, progress)
    finally:
        torch.set_num_threads(before[0])
        _C.set_num_threads(before[1])
    return {"threads": threads, "rounds": rounds, "rows": rows}


def _rows(case, models, rounds, progress):
    expected = case.run(case.model)
    for way, model in models.items():  # which also warms up
        case.check(way, case.run(model), expected)
    order, shuffle = list(models), random.Random(0).shuffle
    seconds = {way: [] for way in models}
    for i in range(rounds):
        shuffle(order)
        for way in order:
            progress(f"{case.what}: round {i + 1} of {rounds}, {way}")
            begin = time.perf_counter()
            case.run(models[way])
            seconds[way].append(time.perf_counter() - begin)
    for way, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds["unpatched"], times, strict=True)]
        rates = sorted(case.n / t for t in times)
        yield {
            "case": case.what, "way": way, "unit": case.unit, "low": rates[0], "high": rates[-1],
            "median": statistics.median(rates), "ratio": statistics.median(ratios),
        }  # fmt: skip


HEAD = ("model", "way", "rate", "range", "unpatched takes")


def cells(data):
    """The rows of a table under `HEAD`."""
    return [
        (
            r["case"], r["way"], f"{r['median']:.1f} {r['unit']}",
            f"{r['low']:.1f} to {r['high']:.1f}",
            "" if r["way"] == "unpatched" else f"{r['ratio']:.2f} x",
        )
        for r in data["rows"]
    ]  # fmt: skip


def table(data):
    """The measurement as a rich table."""
    t = Table(title=f"transformers, float32, {data['threads']} threads, {data['rounds']} rounds")
    for name in HEAD:
        t.add_column(name, justify="left" if name in HEAD[:2] else "right")
    for row in cells(data):
        t.add_row(*row)
    return t

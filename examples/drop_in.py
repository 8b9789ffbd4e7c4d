"""What pyllm makes faster in PyTorch models that are there already, on this machine.

Read it from top to bottom or run it, whole or cell by cell: ``python examples/drop_in.py``. It
takes under a minute; the last part needs transformers, and fetches a model of 83 MB once.
"""

# %% A stopwatch: the contenders take turns, the figures are medians.
import copy
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

import pyllm
from pyllm.loading import LoadError, resolve
from pyllm.nn import LayerNorm, QuantLinear

torch.manual_seed(0)
torch.set_grad_enabled(False)


def race(what, before, after, seconds=4.0):
    """Prints how long both take; each is called for about half of `seconds`."""
    times, calls = {before: [], after: []}, 1
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times[after]) < 3:
        for call in times:
            time.sleep(0.01)  # until the other one's threads have gone to sleep
            call()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            times[call].append((time.perf_counter() - start) / calls)
        calls = max(1, round(2e-3 / times[after][0]))
    a, b = (statistics.median(times[call]) * 1e3 for call in (before, after))
    print(f"{what:58} {a:9.3f} ms -> {b:9.3f} ms   {a / b:5.2f} x")


print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")

# %% A norm. `pyllm.nn.LayerNorm` is torch's with another forward, which can add the residual too.
theirs = nn.LayerNorm(768)
ours = LayerNorm(768)
ours.load_state_dict(theirs.state_dict())
x, residual = torch.randn(64, 768), torch.randn(64, 768)
torch.testing.assert_close(ours(x, residual=residual)[0], theirs(x + residual))
race("add and LayerNorm, 64 rows of 768", lambda: theirs(x + residual),
     lambda: ours(x, residual=residual))  # fmt: skip

# %% A linear layer with weights of 4 bits, for one token: a matter of how many bytes are read.
wide = nn.Linear(2048, 8192)
narrow = QuantLinear.from_linear(wide, bits=4)
token = torch.randn(1, 2048)
race("Linear 2048 -> 8192, one row, weights of 4 bits", lambda: wide(token), lambda: narrow(token))


# %% A model of your own: `pyllm.patch` finds what it can replace, and says what it did.
class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.act = nn.Linear(width, 4 * width), nn.GELU()
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


mine = nn.Sequential(*(Block(512) for _ in range(6)))
patched = copy.deepcopy(mine)
print(pyllm.patch(patched, linear="int8"))
row = torch.randn(1, 512)
race('six blocks of 512, one row, linear="int8"', lambda: mine(row), lambda: patched(row))
pyllm.unpatch(patched)  # and it is what it was
assert torch.equal(patched(row), mine(row))

# %% Sentence embeddings: padding is left out, nothing is quantized.
try:
    from transformers import AutoModel, AutoTokenizer

    path = resolve("all-minilm-l6-v2")
except (ImportError, LoadError) as error:
    raise SystemExit(f"The part about sentence embeddings is left out: {error}") from None

tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()


def embed(model, sentences):
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    hidden, seen = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    return F.normalize((hidden * seen).sum(1) / seen.sum(1), dim=1)


happy = ["That is a happy person", "That is a happy dog", "That is a very happy person"]
text = (__doc__ * 4).split()
sentences = happy + [" ".join(text[:n]) for n in range(2, 80, 6)]
before = embed(model, sentences)
fast = copy.deepcopy(model)
print(pyllm.patch(fast))
after = embed(fast, sentences)
print("cosines to the first:", [round(c, 4) for c in (after[0] @ after[1:3].T).tolist()])
torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
race(f"MiniLM, {len(sentences)} sentences of mixed lengths", lambda: embed(model, sentences),
     lambda: embed(fast, sentences), seconds=8)  # fmt: skip

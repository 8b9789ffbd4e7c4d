"""The engines that end-to-end benchmarks compare, each in a process of its own.

An engine is a class with ``load``, ``prefill`` and ``decode``; adding one is a class here and a
row in `ENGINES`. ``python -m bench.engines NAME MODEL THREADS`` serves one over its standard
streams, a JSON line a request; `Remote` is the other end. Separate processes keep one engine's
waiting threads and memory out of another's figures.
"""

import json
import os
import random
import resource
import subprocess
import sys
import time


class Pyllm:
    """This library, sampling included."""

    package = "pyllm"

    def load(self, model, threads):
        from pyllm import _C, LLM

        _C.set_num_threads(threads)
        self.llm = LLM(model)
        self.vocab = self.llm.model.config.vocab_size

    def prefill(self, ids):
        self.llm.generate(ids, max_new_tokens=1, ignore_eos=True)

    def decode(self, ids, n):
        self.llm.generate(ids, max_new_tokens=1)  # now all prompts are cached, and start together
        answers = self.llm.generate(ids, max_new_tokens=n + 1, ignore_eos=True)
        return max(a.usage.decode_seconds for a in answers)


class LlamaCpp:
    """llama.cpp through llama-cpp-python; nothing is sampled, as in llama-bench."""

    package = "llama_cpp"

    def load(self, model, threads):
        from llama_cpp import Llama

        self.llm = Llama(
            str(model), n_ctx=2048, n_batch=512, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip
        self.vocab = self.llm.n_vocab()

    def prefill(self, ids):
        self.llm.reset()
        self.llm.eval(ids)

    def decode(self, ids, n):
        if len(ids) > 1:
            return None  # its Python interface has no batches
        self.prefill(ids[0])
        begin = time.perf_counter()
        for i in range(n):
            self.llm.eval([ids[0][i % len(ids[0])]])
        return time.perf_counter() - begin


ENGINES = {"pyllm": Pyllm, "llama.cpp": LlamaCpp}


def _serve(name, model, threads):
    # What an engine prints must not get between our lines.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = ENGINES[name]()
    engine.load(model, threads)

    def prompt(n, seed):
        return random.Random(seed).choices(range(100, engine.vocab), k=n)

    def reply(**fields):
        fields["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(fields), file=channel, flush=True)

    reply(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        seed = request["seed"]
        begin = time.perf_counter()
        if request["what"] == "prefill":
            engine.prefill(prompt(request["n"], seed))
            seconds = time.perf_counter() - begin
        else:
            ids = [prompt(request["depth"], seed + i) for i in range(request["batch"])]
            seconds = engine.decode(ids, request["n"])
        reply(seconds=seconds)


class Remote:
    """An engine in a process of its own."""

    def __init__(self, name, model, threads):
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.engines", name, str(model), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._read()

    def seconds(self, **request) -> float | None:
        """Runs one measurement; None if the engine cannot."""
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._read()["seconds"]

    def _read(self):
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: exit code {self._process.wait()}")
        reply = json.loads(line)
        self.peak_mb = reply["peak_mb"]
        return reply

    def close(self):
        self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))

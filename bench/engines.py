"""The engines that end-to-end benchmarks compare, each in a process of its own.

An engine is a class with ``load``, ``prefill`` and ``decode``; adding one is a class here and a
row in `ENGINES`. This module, run with ``NAME MODEL THREADS``, serves one over its standard
streams, a JSON line a request; `Remote` is the other end. Separate processes keep one engine's
waiting threads and memory out of another's figures, and let a peer live in an environment of its
own: `interpreters` finds each.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from itertools import pairwise

CONTEXT = 2048


class Pyllm:
    """This library, sampling included."""

    package = "pyllm"

    def __init__(self, **options):
        self.options = options  # of `LLM`

    def load(self, model, threads):
        from pyllm import _C, LLM

        _C.set_num_threads(threads)
        self.llm = LLM(model, max_context=CONTEXT, **self.options)
        self.vocab = self.llm.model.config.vocab_size

    def prefill(self, ids):
        self.llm.generate(ids, max_new_tokens=1, ignore_eos=True)

    def decode(self, ids, n):
        self.llm.generate(ids, max_new_tokens=1)  # now all prompts are cached, and start together
        engine, ends = self.llm.engine, []

        def step():
            type(engine).step(engine)
            ends.append(time.perf_counter())

        engine.step = step
        try:
            self.llm.generate(ids, max_new_tokens=n + 1, ignore_eos=True)
        finally:
            del engine.step
        return _intervals(ends[-n - 1 :])


class LlamaCpp:
    """llama.cpp through llama-cpp-python's bindings of its C interface, with its own defaults.

    Nothing is sampled, as in llama-bench. A batch has a context of its own.
    """

    package = "llama_cpp"

    def load(self, model, threads):
        import llama_cpp

        self.c, self.threads, self.contexts = llama_cpp, threads, {}
        # Held, since llama.cpp keeps a pointer to it.
        self.log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.log, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            os.fsencode(model), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {model}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def prefill(self, ids):
        context = self._context(1)
        self._run(context, ids, range(len(ids)), [0] * len(ids), [len(ids) - 1])

    def decode(self, ids, n):
        context, batch, depth = self._context(len(ids)), len(ids), len(ids[0])
        for i, prompt in enumerate(ids):
            self._run(context, prompt, range(depth), [i] * depth, [depth - 1])
        ends = [time.perf_counter()]
        for i in range(n):
            tokens = [prompt[i % depth] for prompt in ids]
            self._run(context, tokens, [depth + i] * batch, range(batch), range(batch))
            ends.append(time.perf_counter())
        return _intervals(ends)

    def _context(self, batch):
        c = self.c
        if batch not in self.contexts:
            params = c.llama_context_default_params()
            params.n_ctx, params.n_seq_max = CONTEXT if batch == 1 else batch * 1024, batch
            params.n_batch = params.n_ubatch = 512
            params.n_threads = params.n_threads_batch = self.threads
            context = c.llama_init_from_model(self.model, params)
            self.contexts[batch] = context, c.llama_batch_init(512, 0, 1)
        c.llama_memory_clear(c.llama_get_memory(self.contexts[batch][0]), False)
        return self.contexts[batch]

    def _run(self, context, tokens, positions, sequences, outputs):
        """One step of all tokens, in pieces of at most 512; logits of those at `outputs`."""
        context, batch = context
        for begin in range(0, len(tokens), 512):
            n = min(512, len(tokens) - begin)
            batch.n_tokens = n
            for i in range(n):
                batch.token[i] = tokens[begin + i]
                batch.pos[i] = positions[begin + i]
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequences[begin + i]
                batch.logits[i] = begin + i in outputs
            code = self.c.llama_decode(context, batch)
            if code:
                raise RuntimeError(f"llama_decode: {code}")
        if not self.c.llama_get_logits_ith(context, -1):
            raise RuntimeError("llama.cpp: no logits")


class Transformers:
    """Hugging Face transformers, eager, on the dequantized weights."""

    package = "transformers"
    dtype = "float32"

    def load(self, model, threads):
        import torch

        from .huggingface import hf_from_gguf

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = hf_from_gguf(model).to(getattr(torch, self.dtype))
        self.vocab = self.model.config.vocab_size

    def prefill(self, ids):
        self._run([ids])

    def decode(self, ids, n):
        past = self._run(ids)
        ends = [time.perf_counter()]
        for i in range(n):
            past = self._run([[prompt[i % len(prompt)]] for prompt in ids], past)
            ends.append(time.perf_counter())
        return _intervals(ends)

    def _run(self, ids, past=None):
        with self.torch.inference_mode():
            ids = self.torch.tensor(ids)
            return self.model(
                input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1
            ).past_key_values


class TransformersBF16(Transformers):
    dtype = "bfloat16"


class OpenVINO:
    """OpenVINO GenAI with its default, paged pipeline, on weights of 4 bits in groups of 64."""

    package = "openvino_genai"
    convert = (
        "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", "{source}",
        "--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", "64",
        "--ratio", "1.0", "{target}",
    )  # fmt: skip

    def load(self, model, threads):
        import openvino_genai

        from .models import converted

        folder = converted(model, "openvino", *self.convert)
        self.genai = openvino_genai
        self.pipeline = openvino_genai.LLMPipeline(
            str(folder), "CPU", INFERENCE_NUM_THREADS=threads
        )
        self.vocab = json.loads((folder / "config.json").read_text())["vocab_size"]

    def prefill(self, ids):
        self._generate([ids], 1)

    def decode(self, ids, n):
        # Times of the tokens of the whole batch, in milliseconds.
        ends = self._generate(ids, n + 1).m_new_token_times
        if len(ends) != n + 1:
            raise RuntimeError(f"expected the times of {n + 1} steps, got {len(ends)}")
        return [milliseconds / 1e3 for milliseconds in _intervals(ends)]

    def _generate(self, ids, n):
        import numpy as np
        import openvino as ov

        tokens = np.array(ids, dtype=np.int64)
        inputs = self.genai.TokenizedInputs(ov.Tensor(tokens), ov.Tensor(np.ones_like(tokens)))
        result = self.pipeline.generate(inputs, max_new_tokens=n, ignore_eos=True, do_sample=False)
        return result.perf_metrics.raw_metrics


class OnnxRuntime:
    """ONNX Runtime GenAI, on weights of 4 bits in groups of 32 as its model builder makes them."""

    package = "onnxruntime_genai"
    convert = (
        "-m", "onnxruntime_genai.models.builder", "-i", "{source}", "-o", "{target}", "-p", "int4",
        "-e", "cpu", "-c", "{target}/cache",
    )  # fmt: skip

    def load(self, model, threads):
        import onnxruntime_genai

        from .models import converted

        folder = converted(model, "onnxruntime", *self.convert)
        self.genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(folder))
        threading = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threading}}}))
        self.model = onnxruntime_genai.Model(config)
        settings = json.loads((folder / "genai_config.json").read_text())
        self.vocab = settings["model"]["vocab_size"]

    def prefill(self, ids):
        self._prompt([ids], 1)

    def decode(self, ids, n):
        generator = self._prompt(ids, n + 1)
        ends = [time.perf_counter()]
        for _ in range(n):
            generator.generate_next_token()
            ends.append(time.perf_counter())
        return _intervals(ends)

    def _prompt(self, ids, n):
        import numpy as np

        params = self.genai.GeneratorParams(self.model)
        length = len(ids[0]) + n
        params.set_search_options(
            batch_size=len(ids), min_length=length, max_length=length, do_sample=False
        )
        generator = self.genai.Generator(self.model, params)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        generator.generate_next_token()
        return generator


ENGINES = {
    "pyllm": Pyllm,
    "llama.cpp": LlamaCpp,
    "openvino int4": OpenVINO,
    "onnxruntime-genai int4": OnnxRuntime,
    "transformers float32": Transformers,
    "transformers bfloat16": TransformersBF16,
}


def interpreters(names=None, other=None) -> tuple[dict, list]:
    """``{engine: the Python that has its package}``, and the engines that are nowhere installed.

    Args:
        names: of `ENGINES`; all by default.
        other: a Python of another environment, where peers are looked for first: say, one whose
            llama.cpp was built for another instruction set (then set PYLLM_CPU_ISA too).
    """
    for name in names or []:
        if name not in ENGINES:
            raise ValueError(f"engine: expected {', '.join(ENGINES)}, got {name!r}")
    ours = [name for name in names or ENGINES if ENGINES[name] is Pyllm]
    found = dict.fromkeys(ours, sys.executable)
    for python in filter(None, [other, sys.executable]):
        missing = [name for name in names or ENGINES if name not in found]
        packages = {name: ENGINES[name].package for name in missing}
        has = _installed(set(packages.values()), python)
        found |= {name: python for name, package in packages.items() if package in has}
    order = [name for name in names or ENGINES if name in found]
    return {name: found[name] for name in order}, [n for n in names or ENGINES if n not in found]


def _installed(packages, python):
    if python == sys.executable:
        return {p for p in packages if importlib.util.find_spec(p)}
    code = "import sys, importlib.util as u; print(*(p for p in sys.argv[1:] if u.find_spec(p)))"
    run = subprocess.run([python, "-c", code, *packages], stdout=subprocess.PIPE, text=True)
    return set(run.stdout.split()) if run.returncode == 0 else set()


def _intervals(ends):
    return [b - a for a, b in pairwise(ends)]


def peak_mb() -> float:
    """The most memory that this process has had resident; getrusage would count its parent's."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmHWM"))


def _serve(name, model, threads):
    # What an engine prints must not get between our lines.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = ENGINES[name]()
    engine.load(model, threads)

    def prompt(n, seed):
        return random.Random(seed).choices(range(100, engine.vocab), k=n)

    def reply(**fields):
        fields["peak_mb"] = peak_mb()
        print(json.dumps(fields), file=channel, flush=True)

    reply(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        seed = request["seed"]
        if request["what"] == "prefill":
            ids = prompt(request["n"], seed)
            begin = time.perf_counter()
            engine.prefill(ids)
            seconds = [time.perf_counter() - begin]
        else:
            ids = [prompt(request["depth"], seed + i) for i in range(request["batch"])]
            seconds = engine.decode(ids, request["n"])
        reply(seconds=seconds)


class Remote:
    """An engine in a process of its own."""

    def __init__(self, name, model, threads, python=sys.executable):
        self.name = name
        self._process = subprocess.Popen(
            [python, "-m", f"{__package__}.engines", name, str(model), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        self._read()

    def seconds(self, *, what, n, depth=0, batch=1, seed=0) -> list[float] | None:
        """Runs one measurement: the seconds of the prompt, or of each of `n` decoding steps.

        None if the engine cannot run `batch` sequences at once.
        """
        request = {"what": what, "n": n, "depth": depth, "batch": batch, "seed": seed}
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

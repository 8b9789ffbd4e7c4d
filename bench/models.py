"""Models that benchmarks run: names, and files that are made on first use.

Made files lie in the cache beside the fetched ones, under ``bench/``. The Q4_0 file is the Q4_1
file requantized by llama.cpp: its text is poor, it is there for its speed. The random models have
the shape of Llama-3.2-1B (vocabulary and tied head included; the head is Q8_0, and tokens beyond
SmolLM2's vocabulary have no text), larger than any cache: quants are uniform, scales such that
every matrix keeps the size of its input. The Hugging Face directory holds the dequantized weights
of a GGUF file, for the peers that convert such a directory to their own format.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pyllm.loading import resolve
from pyllm.loading.pull import cache_dir

LLAMA_1B = {
    "hidden": 2048, "ffn": 8192, "layers": 16, "heads": 32, "kv_heads": 8, "head_dim": 64,
    "vocab": 128256,
}  # fmt: skip
# Of a block: bytes, where its fp16 scales are, the standard deviation of its uniform quants.
BLOCKS = {"Q4_0": (18, 4.6), "Q8_0": (34, 73.9)}
WEIGHTS_PER_BLOCK = 32


def path_of(name, folder=None) -> Path:
    """The file of a model: one of `MADE`, or whatever `pyllm.loading.resolve` knows.

    Args:
        folder: where made files are kept; by default in pyllm's cache.
    """
    make = MADE.get(str(name))
    if make is None:
        return resolve(name)
    path = (folder or cache_dir() / "bench") / f"{name}.gguf"
    if not path.exists():
        with _written(path) as work:
            make(work)
    return path


def requantize(source, path):
    """Rewrites the matrices of a GGUF file in Q4_0 with llama.cpp; a Q8_0 embedding stays."""
    import llama_cpp

    log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(log, None)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.allow_requantize = True
    params.token_embedding_type = llama_cpp.GGML_TYPE_Q8_0
    params.output_tensor_type = llama_cpp.GGML_TYPE_Q8_0
    failed = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(path), params)
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), None)  # before `log` goes
    if failed:
        raise RuntimeError(f"llama.cpp could not requantize {source}")


def write_random(path, quant, *, vocabulary_of, shape=None, seed=0):
    """Writes a Llama of random blocks as GGUF, a tensor at a time.

    Args:
        quant: a key of `BLOCKS`, of the matrices; the embedding and tied head are Q8_0.
        vocabulary_of: the GGUF file whose tokenizer it gets.
        shape: as `LLAMA_1B`.
    """
    import gguf

    shape = shape or LLAMA_1B
    hidden, ffn, kv = shape["hidden"], shape["ffn"], shape["kv_heads"] * shape["head_dim"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name(f"random {quant}")
    writer.add_context_length(8192)
    writer.add_embedding_length(hidden)
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_vocab_size(shape["vocab"])
    _copy_tokenizer(writer, vocabulary_of, shape["vocab"])

    matrices = {"token_embd": (shape["vocab"], hidden, "Q8_0")}
    vectors = ["output_norm"]
    for i in range(shape["layers"]):
        vectors += [f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"]
        sizes = {
            "attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
            "attn_output": (hidden, hidden), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden),
            "ffn_down": (hidden, ffn),
        }  # fmt: skip
        matrices |= {f"blk.{i}.{name}": (*size, quant) for name, size in sizes.items()}
    for name in vectors:
        writer.add_tensor_info(f"{name}.weight", (hidden,), np.dtype(np.float32), 4 * hidden)
    for name, (rows, columns, kind) in matrices.items():
        row_bytes = columns // WEIGHTS_PER_BLOCK * BLOCKS[kind][0]
        writer.add_tensor_info(
            f"{name}.weight", (rows, row_bytes), np.dtype(np.uint8), rows * row_bytes,
            raw_dtype=gguf.GGMLQuantizationType[kind],
        )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    for _ in vectors:
        writer.write_tensor_data(rng.uniform(0.8, 1.2, hidden).astype(np.float32))
    for rows, columns, kind in matrices.values():
        writer.write_tensor_data(random_blocks(rows, columns, kind, rng))
    writer.close()


def random_blocks(rows, columns, kind, rng):
    """uint8 ``[rows, bytes]``: weights of about ``columns ** -0.5``, around 0."""
    nbytes, deviation = BLOCKS[kind]
    blocks = rng.integers(0, 256, (rows * columns // WEIGHTS_PER_BLOCK, nbytes), dtype=np.uint8)
    scale = rng.uniform(0.5, 1.5, len(blocks)) / deviation / columns**0.5
    blocks[:, :2] = scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def huggingface(gguf_path) -> Path:
    """A Hugging Face directory with the dequantized weights of a GGUF file, and its tokenizer."""
    gguf_path = Path(gguf_path)
    target = cache_dir() / "bench" / f"{gguf_path.stem}-huggingface"
    if not target.exists():
        import transformers

        from .huggingface import hf_from_gguf

        with _written(target) as work:
            hf_from_gguf(gguf_path).save_pretrained(work)
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                gguf_path.parent, gguf_file=gguf_path.name
            )
            tokenizer.save_pretrained(work)
    return target


def converted(gguf_path, engine, *command) -> Path:
    """What a peer's converter makes of `huggingface`: a directory.

    Args:
        engine: names the directory.
        command: arguments of Python, with ``{source}`` and ``{target}`` in them.
    """
    gguf_path = Path(gguf_path)
    target = cache_dir() / "bench" / f"{gguf_path.stem}-{engine}"
    if not target.exists():
        # In processes of their own: this one's memory is measured.
        code = f"import sys; from {__name__} import huggingface; print(huggingface(sys.argv[1]))"
        made = subprocess.check_output([sys.executable, "-c", code, str(gguf_path)], text=True)
        source = made.splitlines()[-1]
        with _written(target) as work:
            filled = [part.format(source=source, target=work) for part in command]
            subprocess.run(
                [sys.executable, *filled], check=True, stdout=sys.stderr,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
    return target


def _copy_tokenizer(writer, path, size):
    """The tokenizer's fields of another file; its vocabulary is cut or filled up to `size`."""
    import gguf

    for name, field in gguf.GGUFReader(str(path)).fields.items():
        if not name.startswith("tokenizer."):
            continue
        value, kind = field.contents(), field.types[0]
        if name == "tokenizer.ggml.tokens":
            value = [*value[:size], *(f"<unused{i}>" for i in range(size - len(value)))]
        elif name == "tokenizer.ggml.token_type":
            value = [*value[:size], *[gguf.TokenType.UNUSED] * (size - len(value))]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, sub_type=sub_type)


@contextmanager
def _written(path):
    """A place to write at, which becomes `path` when all is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{os.getpid()}-{path.name}")
    yield work
    os.replace(work, path)


def _q4_0(path):
    requantize(resolve("smollm2-135m"), path)


def _random(quant):
    return lambda path: write_random(path, quant, vocabulary_of=resolve("smollm2-135m"))


MADE = {
    "smollm2-135m-q4_0": _q4_0,
    "random-1b-q4_0": _random("Q4_0"),
    "random-1b-q8_0": _random("Q8_0"),
}
NAMES = ["smollm2-135m", *MADE]

"""The sizes of real models, by name: what `--shapes` takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, as Hugging Face's configurations name them."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """``(N, K)`` of the matrices of a layer, q, k, v and gate, up fused, and of the head."""
        q = self.heads * self.head_dim
        return {
            "qkv": (q + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o": (self.hidden, q),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "head": (self.vocab, self.hidden),
        }


SHAPES = {
    "smollm2-135m": Shape(576, 1536, 9, 3, 64, 49152),
    "qwen2.5-0.5b": Shape(896, 4864, 14, 2, 64, 151936),
    "llama3.2-1b": Shape(2048, 8192, 32, 8, 64, 128256),
    "gemma2-2b": Shape(2304, 9216, 8, 4, 256, 256000),
    "phi3-mini": Shape(3072, 8192, 32, 32, 96, 32064),
    "mistral-7b": Shape(4096, 14336, 32, 8, 128, 32768),
    "llama3-8b": Shape(4096, 14336, 32, 8, 128, 128256),
    "llama3-70b": Shape(8192, 28672, 64, 8, 128, 128256),
    # For dry runs: everything that a kernel does, in a second on the slowest backend.
    "tiny": Shape(64, 96, 4, 2, 32, 128),
}


def parse(names: str) -> dict[str, Shape]:
    """``llama3-8b,smollm2-135m`` as `SHAPES`; a model of one's own is six numbers joined by x:
    hidden x intermediate x heads x kv_heads x head_dim x vocab."""
    found = {}
    for name in names.split(","):
        numbers = name.split("x")
        if name in SHAPES:
            found[name] = SHAPES[name]
        elif len(numbers) == 6 and all(n.isdigit() and int(n) for n in numbers):
            found[name] = Shape(*map(int, numbers))
        else:
            raise ValueError(
                f"--shapes: expected {', '.join(SHAPES)}, or hidden x intermediate x heads x "
                f"kv_heads x head_dim x vocab, such as 576x1536x9x3x64x49152; got {name!r}"
            )
    return found

"""The shapes and dtypes that tests and benchmarks share."""

import torch

# What runs the kernels for a device: the CUDA ones on the emulator everywhere, and on a device if
# there is one; the Triton ones on the device, else in Triton's interpreter. (conftest.py marks what
# needs a device `gpu`, and makes tensors there.)
CUDA = ["emulator", "cuda"]
DEVICES = [*CUDA, "triton"]
# Every backend with hand-written kernels.
BACKENDS = ["cpu", *DEVICES]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# (rows, width) of norms and activations: size one, empty, odd, a model's, more than one chunk.
ROWS = [(1, 1), (0, 64), (1, 64), (3, 17), (5, 100), (2, 576), (33, 576), (7, 4096), (300, 96)]


def rand(*shape, dtype=torch.float32, seed=0, scale=1.0):
    """Normal random numbers that depend on the shape and the seed only."""
    generator = torch.Generator().manual_seed(seed * 1000003 + hash(shape) % 1000003)
    x = torch.randn(*shape, generator=generator, device="cpu") * scale
    return x.to(torch.get_default_device(), dtype)


def strided(x, extra=5):
    """A copy of `x` whose rows lie further apart than their width."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + extra), float("nan"), dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def beside(x, options):
    """The options of a call, tensors among them on the device of `x`."""
    return {n: o.to(x.device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


# (new tokens, keys in the cache before them) of the sequences of a ragged batch: one token, a whole
# prompt, decoding at several depths, mixtures, an empty sequence between others.
RAGGED = [
    [(1, 0)],
    [(17, 0)],
    [(1, 300)],
    [(5, 40), (1, 7), (33, 0)],
    [(1, 511), (1, 512), (1, 513), (0, 3), (2, 63)],
]


class PagedBatch:
    """The integers of a ragged batch over a paged cache whose pages lie in no order."""

    def __init__(self, sequences, page_size=16, spare_pages=3, seed=0):
        new = torch.tensor([n for n, _ in sequences], dtype=torch.int32)
        self.context_lens = new + torch.tensor([past for _, past in sequences], dtype=torch.int32)
        self.cu_seqlens_q = torch.cat((torch.zeros(1), new.cumsum(0))).int()
        self.positions = torch.cat([torch.arange(p, p + n) for n, p in sequences]).int()
        self.page_size = page_size
        pages = (self.context_lens + page_size - 1) // page_size
        self.n_pages = int(pages.sum()) + spare_pages
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.n_pages, generator=generator).int()
        # Entries beyond a sequence's pages are nonsense that must not be followed.
        self.page_table = torch.full((len(sequences), int(pages.max()) + 2), -7, dtype=torch.int32)
        for row, part in zip(
            self.page_table, order.split([*pages.tolist(), spare_pages]), strict=False
        ):
            row[: len(part)] = part

    @property
    def tokens(self):
        return int(self.cu_seqlens_q[-1])

    def caches(self, kv_heads, head_dim, dtype, value=float("nan")):
        """Two caches full of `value`."""
        shape = (self.n_pages, self.page_size, kv_heads, head_dim)
        return torch.full(shape, value, dtype=dtype), torch.full(shape, value, dtype=dtype)


# (query heads, KV heads, head dim): one head, groups of 1 to 8, odd sizes, models' sizes.
HEADS = [(1, 1, 1), (3, 1, 7), (4, 2, 32), (9, 3, 64), (2, 2, 80), (6, 3, 96), (7, 7, 112)]
HEADS += [(8, 1, 128), (4, 2, 256)]


def relaid(x, *order):
    """The same tensor, its dimensions in this order in memory."""
    return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])


# Arguments of a norm of x [2, 8], and what is said of them.
BAD_NORM_ARGUMENTS = [
    ({"weight": torch.ones(7)}, r"weight: expected .*\[D\], got float32\[7\] \(D is 8\)"),
    ({"x": torch.ones(2, 8, dtype=torch.int32)}, "x: expected float32"),
    ({"residual": torch.ones(3, 8)}, r"residual: expected .*\(T is 2\)"),
    ({"x": torch.ones(8, 2).t()}, "contiguous last dimension"),
    ({"out": torch.ones(2, 8).half()}, "out: expected float32"),
]

"""The harness of transpose.cu: `pyllm emulate` calls run() once for each order of lanes."""

import torch


def run(program):
    n = 128
    x, y = torch.randn(n, n), torch.full((n, n), float("nan"))
    program.launch("transpose", grid=(n // 32, n // 32), block=(32, 8), args=[x, y, n])
    assert torch.equal(y, x.T)

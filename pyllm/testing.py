"""The one rule for "correct".

Against the reference in float64 (or float32), a kernel's error is at most twice that of the same
computation done by PyTorch in the kernel's own dtype, plus a stated floor; positions of inf and NaN
match; every element of a poisoned output was written.
"""

import torch

# One unit in the last place of a value of size 1, the floor when none is stated.
EPS = {torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4, torch.float64: 2.3e-16}


def assert_close(actual, exact, same_dtype, *, floor=None, what="output"):
    """Checks `actual` by the rule above.

    Args:
        actual: the kernel's output.
        exact: the reference's output for the same inputs in float64 or float32.
        same_dtype: the reference's computation done by PyTorch in the kernel's own dtype.
        floor: absolute error always allowed; by default one ulp at the scale of `exact`.
    """
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    a, e, b = actual.double(), exact.double(), same_dtype.double()
    assert torch.equal(torch.isnan(a), torch.isnan(e)), f"{what}: NaN at other positions"
    inf = torch.isinf(e)
    assert torch.equal(a[inf], e[inf]), f"{what}: inf at other positions"
    finite = torch.isfinite(e)
    if not finite.any():
        return
    scale = e[finite].abs().max().item()
    if floor is None:
        floor = EPS[actual.dtype] * max(scale, 1e-30)
    error = (a - e)[finite].abs().max().item()
    both = finite & torch.isfinite(b)
    baseline = (b - e)[both].abs().max().item() if both.any() else 0.0
    assert error <= 2 * baseline + floor, (
        f"{what}: error {error:.3g}, expected at most 2 * {baseline:.3g} (PyTorch's own in "
        f"{actual.dtype}) + {floor:.3g}"
    )


def poisoned(shape, dtype):
    """An output tensor full of NaN, or of a pattern for integers, to see what was not written."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype)
    return torch.full(shape, 0x5A, dtype=dtype)

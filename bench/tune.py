"""``python -m bench tune``: measures configurations of the Triton kernels on this device.

What a call of an op asks for is recorded; each choice of `configurations.CHOICES` near the table's
line is held to the reference, as every benchmark is, and those that are right take turns with it.
The fastest goes into the device's file, if it beats the line by more than timing can err.
"""

import torch

from pyllm.kernels import configurations
from pyllm.ops import registry

from . import kernels, timing
from .case import Setting
from .shapes import SHAPES

BETTER = 0.03  # by which a configuration has to beat the table's line


def tune(
    ops=None, shapes=("llama3-8b",), dtypes=("bfloat16",), *, device="cuda", match=None, rounds=7,
    time=None, say=lambda text: None,
):  # fmt: skip
    """Measures, case by case.

    Args:
        ops, shapes, dtypes: names, as of `kernels.measure`; None for all ops with Triton kernels.
        device: "cuda"; "cpu" in Triton's interpreter, where times mean nothing.
        match: only cases whose shape has this in it.
        time: ``time({name: [calls]})`` -> seconds by name; takes turns on the device by default.
        say: called with a line about each case.

    Returns:
        ``{kernel: {case: entry}}``, for `configurations.write`.
    """
    time = time or (lambda calls: _seconds(calls, device, rounds))
    found = {}
    for dtype in dtypes:
        setting = Setting(device, kernels.DTYPES[dtype], device == "cpu")
        for op in ops or kernels.OPS:
            if "triton" not in registry.OPS[op].backends:
                continue
            for shape in shapes:
                for case in kernels.cases_of(op, shape, SHAPES[shape], setting):
                    if not match or match in case.shape:
                        _tune_case(case, time, found, say)
    return found


def _tune_case(case, time, found, say):
    arguments = case.make()
    with configurations.recorded() as asked:
        kernels.verify(case, arguments, "triton")
    for (kernel, key), line in asked.items():
        if key in found.get(kernel, {}):  # the first call that asks for it stands for all
            continue
        right = {}
        for i, choice in enumerate([line, *around(line, configurations.CHOICES[kernel])]):
            why = _wrong(case, arguments, {(kernel, key): choice})
            if why is None:
                right[i] = choice
            elif i == 0:
                raise RuntimeError(f"{kernel}: {key}: the table's own configuration: {why}")
            else:
                say(f"{kernel}: {key}: not {choice}: {why}")
        seconds = time({i: _call(case, arguments, (kernel, key), c) for i, c in right.items()})
        best = min(seconds, key=seconds.get)
        if seconds[best] > (1 - BETTER) * seconds[0]:
            best = 0
        say(f"{kernel}: {key}: {seconds[best] * 1e6:.1f} us, the table's {seconds[0] * 1e6:.1f}")
        found.setdefault(kernel, {})[key] = {
            "configuration": right[best], "us": round(seconds[best] * 1e6, 3),
            "table_us": round(seconds[0] * 1e6, 3), "call": case.shape,
        }  # fmt: skip


def around(line: dict, choices: dict) -> list[dict]:
    """Configurations that differ from `line` in one or two numbers, by a step or two each."""
    near = {}
    for name, values in choices.items():
        ordered = sorted({*values, line[name]})
        at = ordered.index(line[name])
        near[name] = [v for v in ordered[max(0, at - 2) : at + 3] if v != line[name]]
    single = [line | {name: v} for name, values in near.items() for v in values]
    names = list(near)
    double = [
        line | {a: v, b: w}
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        for v in near[a]
        for w in near[b]
    ]
    return single + double


def _wrong(case, arguments, choice):
    """Why the case cannot be computed, or is computed wrong, with a configuration; or None."""
    try:
        with configurations.tried(choice):
            kernels.verify(case, arguments, "triton")
    except Exception as error:  # too much shared memory, a compiler's failure, a wrong result
        return f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    return None


def _call(case, arguments, at, choice):
    def call():
        with configurations.tried({at: choice}):
            case.call(arguments, "triton")

    return [call]


def _seconds(calls, device, rounds):
    with torch.inference_mode():
        times = timing.measure(calls, device=device, rounds=rounds)
    return {name: t.summary()["seconds"] for name, t in times.items()}

"""What `pyllm.patch` did."""

import re
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Replaced:
    """A module that was replaced.

    Attributes:
        name: as in ``model.named_modules()``.
        before, after: the names of the classes, or of what is computed otherwise.
    """

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Left:
    """A module that could have been replaced, and why it was not."""

    name: str
    what: str
    why: str


@dataclass(frozen=True)
class PatchReport:
    """What `pyllm.patch` replaced and what it left; print it.

    Attributes:
        replaced, left: in the order of ``model.named_modules()``.
        notes: what goes to PyTorch or transformers although it was replaced, and when.
        already: whether the model had been patched with the same options before: nothing was done
            now, and this is what the first call said.
    """

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]
    notes: tuple[str, ...] = ()
    already: bool = False

    def __str__(self):
        done = "already patched" if self.already else "patched"
        lines = [f"{done}: {len(self.replaced)} modules replaced, {len(self.left)} left"]
        for what, names in _grouped((f"{r.before} -> {r.after}", r.name) for r in self.replaced):
            lines.append(f"  {what}: {names}")
        for what, names in _grouped((f"left {x.what}: {x.why}", x.name) for x in self.left):
            lines.append(f"  {what}: {names}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _grouped(pairs):
    """``(what, "12 x model.layers.*.mlp, ...")`` for each thing that was done."""
    groups = {}
    for what, name in pairs:
        pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) or "the model itself"
        groups.setdefault(what, Counter())[pattern] += 1
    for what, patterns in groups.items():
        yield what, ", ".join(f"{n} x {p}" if n > 1 else p for p, n in patterns.items())

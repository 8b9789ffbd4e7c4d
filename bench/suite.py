"""Every benchmark on every model, each into a JSON file of its own."""

import json
import time

from . import (
    drop_in,
    end_to_end,
    interference,
    kernels,
    limits,
    models,
    modules,
    overhead,
    perplexity,
    profile,
    prompt_lookup,
    record,
    startup,
)

SAME = {"engines": list(end_to_end.SAME_BYTES)}


def is_large(name) -> bool:
    """Whether a model is larger than any cache."""
    return name.startswith("random-")


def every(name):
    return True


def is_small(name):
    return not is_large(name)


def writes_text(name):
    return name not in models.MADE


# What is measured on which models, in the order of importance: (kind, what is added to the file's
# name, function, options, whether for a model, by its name, share of the minutes). Without a
# share it takes the time that it takes, which is seconds. The large models (the random ones) run
# beside the peers that read the same bytes; converting them for the others would take long.
PARTS = [
    ("profile", "-depth16", profile.measure, {"depth": 16}, every, 0),
    ("profile", "-depth512", profile.measure, {"depth": 512}, every, 0),
    ("end_to_end", "", end_to_end.report, {}, every, 3),
    ("startup", "", startup.measure, {"rounds": 5}, is_small, 0),
    ("interference", "", interference.measure, {"rounds": 5}, is_small, 0),
    ("perplexity", "", perplexity.measure, {"rounds": 5}, writes_text, 0),
    ("prompt_lookup", "", prompt_lookup.measure, {"rounds": 3}, writes_text, 0),
    ("context", "", end_to_end.report, {"tests": end_to_end.DEPTHS, **SAME}, is_small, 1),
]
KERNELS, DROP_IN = "kernels", "drop_in"  # need none of the models
KINDS = [KERNELS, *dict.fromkeys(part[0] for part in PARTS), DROP_IN]


def files(names, only=None):
    """``(file name, model, kind, function, options, share)`` of all parts, one by one."""
    for kind, suffix, measure, options, fits, share in PARTS:
        for name in names:
            if fits(name) and (not only or kind in only):
                yield f"{kind}-{name}{suffix}.json", name, kind, measure, options, share


def run(
    folder, names, *, threads, rounds, minutes, only=None, resume=False, other=None,
    progress=lambda text: None,
):  # fmt: skip
    """Runs all; a benchmark that is timed in rounds gets its share of `minutes`.

    Args:
        only: kinds, of `KINDS`.
        resume: True leaves out what was measured at this very commit.
    """
    if unknown := set(only or ()) - set(KINDS):
        raise ValueError(f"part: expected {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
    where = record.environment(threads, other)
    record.write(folder / "limits.json", {"limits": limits.measure(threads=threads)}, where)
    record.write(folder / "overhead.json", overhead.measure(threads, progress=progress), where)
    record.write(folder / "modules.json", modules.measure(threads, progress=progress), where)
    path = folder / f"{KERNELS}.json"
    if (not only or KERNELS in only) and not (resume and _is_done(path)):
        where = record.environment(threads, other)
        shown = kernels.measure(
            threads=threads, rounds=rounds, progress=lambda done, total, text: progress(text)
        )
        record.write(path, shown, where)
        kernels.write_csv(shown, path.with_suffix(".csv"))
    parts = [p for p in files(names, only) if not (resume and _is_done(folder / p[0]))]
    end, shares = time.monotonic() + 60 * minutes, sum(share for *_, share in parts)
    for file, name, kind, measure, options, share in parts:
        progress(f"{kind} {name}")
        if share:
            left = max(0.0, end - time.monotonic()) / 60 * share / shares
            shares -= share
            options = {"rounds": rounds, "minutes": left, "other": other, **options}
            if is_large(name):
                options |= SAME
        if kind != "profile":
            options = {**options, "progress": progress}
        where = record.environment(threads, other)
        data = measure(models.path_of(name), threads=threads, **options)
        record.write(folder / file, data, where)
    path = folder / f"{DROP_IN}.json"
    wanted = DROP_IN in only if only else not drop_in.missing()
    if wanted and not (resume and _is_done(path)):
        where = record.environment(threads, other)
        data = drop_in.measure(threads=threads, rounds=rounds, progress=progress)
        record.write(path, data, where)


def _is_done(path):
    if not path.exists():
        return False
    commit = json.loads(path.read_text())["environment"]["commit"]
    return commit == record.commit() and not commit.endswith("-dirty")

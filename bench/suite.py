"""Every benchmark on every model, each into a JSON file of its own."""

import time

from . import end_to_end, interference, limits, models, profile, record, startup


def run(folder, names, *, threads, rounds, minutes, other=None, progress=lambda text: None):
    """Runs all within about `minutes`: a benchmark that is timed in rounds gets its share.

    The models that are larger than caches (the random ones) are measured end to end and profiled
    beside the peers that read the same bytes; converting them for the others would take long.
    """
    end = time.monotonic() + 60 * minutes
    small = [name for name in names if not name.startswith("random-")]
    shares = 4 * len(small) + 2 * (len(names) - len(small))  # end to end, and a context's half

    def left(share):
        nonlocal shares
        budget = max(0.0, end - time.monotonic()) / 60 * share / max(shares, 1)
        shares -= share
        return budget

    def save(kind, name, measure, **options):
        progress(f"{kind} {name}")
        where = record.environment(threads, other)
        path = folder / f"{kind}-{name}.json"
        record.write(path, measure(models.path_of(name), threads=threads, **options), where)

    where = record.environment(threads, other)
    record.write(folder / "limits.json", {"limits": limits.measure(threads=threads)}, where)
    for name in names:
        save("profile", name, profile.measure)
    for name in small:
        few = min(rounds, 5)
        save("startup", name, startup.measure, rounds=few, progress=progress)
        save("interference", name, interference.measure, rounds=few, progress=progress)
    same = list(end_to_end.SAME_BYTES)
    for name in names:
        share = 3 if name in small else 2
        save(
            "end_to_end", name, end_to_end.report, rounds=rounds, minutes=left(share), other=other,
            engines=None if name in small else same, progress=progress,
        )  # fmt: skip
        if name in small:
            save(
                "context", name, end_to_end.report, rounds=rounds, minutes=left(1),
                engines=same, tests=end_to_end.DEPTHS, progress=progress,
            )  # fmt: skip

"""What each CUDA kernel moves is what it moved before: a contract that needs no GPU."""

import json

import pytest

from pyllm.bench import emulate

COMMITTED = json.loads(emulate.TABLE.read_text())


def test_the_table_has_every_case():
    listed = {op: list(cases) for op, cases in COMMITTED.items()}
    assert listed == {op: list(cases) for op, cases in emulate.CASES.items()}


@pytest.mark.parametrize(
    ("op", "case"), [(op, case) for op, cases in emulate.CASES.items() for case in cases]
)
def test_traffic(op, case):
    counted = emulate.measure_case(emulate.CASES[op][case])
    assert counted == COMMITTED[op][case], (
        "the traffic changed; if that is meant: python -m bench --emulate all --update"
    )


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_norms_move_what_they_must(op):
    for case in emulate.CASES[op]:
        if case.endswith("4097"):  # one value at a time
            continue
        # The parameters are read by every row, from L1, and a scale is four bytes of a sector.
        buffers = COMMITTED[op][case]["buffers"].items()
        rows = {name: b for name, b in buffers if name not in ("weight", "scale")}
        assert all(b["moved"] == b["minimum"] for b in rows.values()), rows

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


def test_norms_move_what_they_must():
    for case in ("fp16 8 x 4096", "fp16 8 x 4096 residual", "fp32 3 x 1024"):
        buffers = COMMITTED["rms_norm"][case]["buffers"]
        # The weight is read by every row, from L2; everything else once.
        rows = {name: b for name, b in buffers.items() if name != "weight"}
        assert all(b["moved"] == b["minimum"] for b in rows.values()), rows

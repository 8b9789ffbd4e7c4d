"""The machine code of the GPU kernels: what was committed is good, and is what compilers make."""

import json
import struct

import pytest

from pyllm.bench import cubin, machine_code, nvcc

COMMITTED = json.loads(machine_code.TABLE.read_text())
KERNELS = {
    f"{group}: {name}": row
    for group, kernels in COMMITTED["kernels"].items()
    for name, row in kernels.items()
}
# What has no 16-byte loads, and need not.
NARROW = (
    "pack_fragments_kernel",  # bytes here and there, once in the life of a weight
    "quant_embedding_kernel",  # a group of a row's weights, and their scale, at a time
    "relu 100",  # rows that begin anywhere
    "bf16 128: norm_backward",  # a row is 2 bytes a thread
    "count_kernel",  # tokens that were drawn
    "greedy: choose_kernel", "no logprobs: choose_kernel",  # a number a chunk
)  # fmt: skip


# What spills, though it should not: 32 and 24 bytes, beside sums that fill the registers.
SPILLING = (
    "triton/paged_attention/cuda:80: bf16 128 prompt: _attention",
    "triton/paged_attention/cuda:100: bf16 256 decode: _attention",
)


def batch(*groups, marks=()):
    """Groups that are compiled together."""
    return pytest.param(groups, marks=marks, id=groups[0])


def of(start, end=""):
    return [g for g in COMMITTED["kernels"] if g.startswith(start) and g.endswith(end)]


# Those without a mark are compiled by every test run. Of the others it is enough that they were
# compiled from the sources that are here, which `test_the_table_is_of_these_sources` says.
BATCHES = [
    batch("cuda/flash_attention/sm_80"),
    batch("cuda/flash_attention/sm_90a"),
    batch(*of("cuda/"), marks=pytest.mark.long),
    batch(*of("triton/", "/cuda:90")),
    batch(*of("triton/", "/hip:gfx942"), marks=pytest.mark.slow),
    batch(*of("triton/", "/cuda:80"), marks=pytest.mark.long),
    batch(*of("triton/", "/cuda:100"), marks=pytest.mark.long),
]
# The KB of shared memory that a block may have, where the launch asks for it.
SHARED = {"cuda:80": 163, "cuda:90": 227, "cuda:100": 227, "hip:gfx942": 64}


def test_no_kernel_uses_local_memory():
    bad = [
        name
        for name, row in KERNELS.items()
        if any(row.get(k) for k in machine_code.COSTS) and name not in SPILLING
    ]
    assert not bad, f"they spill or index registers: {bad}"


def test_every_kernel_loads_sixteen_bytes_at_once():
    wide = ("ldg_128", "ldgsts", "bulk")
    narrow = [
        name
        for name, row in KERNELS.items()
        if not any(map(row.get, wide)) and not any(n in name for n in NARROW) and "hip" not in name
    ]
    assert not narrow, f"they have no 16-byte loads: {narrow}"


def test_matrix_kernels_use_the_tensor_cores():
    matrix = ("flash_attention_kernel", "paged_attention_kernel", "quant_matmul_kernel")
    matrix += (": _forward", ": _backward", ": _attention", ": _matmul")
    some = {name: row for name, row in KERNELS.items() if any(m in name for m in matrix)}
    assert {name.split("/")[0] for name in some} == set(machine_code.SOURCES)
    units = ("hmma", "imma", "gmma", "utcmma", "mfma")
    scalar = [n for n, row in some.items() if not any(map(row.get, units))]
    assert not scalar, f"they have no tensor core instructions: {scalar}"


def test_every_group_is_in_the_table():
    listed = [g for g in COMMITTED["kernels"] if not machine_code.missing(g.split("/")[0])]
    found = machine_code.groups()
    if not found:
        pytest.skip("; ".join(map(str, map(machine_code.missing, machine_code.SOURCES))))
    assert sorted(listed) == sorted(found), "make machine-code"


def test_the_table_is_of_these_sources():
    """Whoever changes a kernel has to compile it: then the numbers above are its own."""
    for source, module in machine_code.SOURCES.items():
        found = COMMITTED["sources"][source]
        assert found == module.fingerprint(), "kernels changed: make machine-code"


def test_comments_and_layout_are_no_change(tmp_path, monkeypatch):
    source = tmp_path / "a.cu"

    def fingerprint(text):
        source.write_text(text)
        monkeypatch.setattr(nvcc, "files", lambda: [source])
        return nvcc.fingerprint()

    first = fingerprint("int x = 1;  // one\n")
    assert fingerprint("// what it is for\nint x =\n    1;\n") == first
    assert fingerprint("int x = 2;\n") != first


def test_counting():
    code = """
        /*0000*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0010*/              @!P0 LDG.E.U16 R5, [R2.64] ;
        /*0020*/             @!UP0 STG.E.64 [R2.64], R4 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/                   STL [R1], R4 ;
"""
    assert cubin.count(code) == {
        "hmma": 1, "ldg_128": 1, "ldg_narrow": 1, "stg_narrow": 1, "ldgsts": 1, "local": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 1024, 0, 2),  # 64 warps
        (33, 1024, 0, 1),  # 40 registers a lane are taken
        (255, 128, 0, 2),
        (24, 32, 0, 32),
        (24, 32, 40 << 10, 4),
    ],
)
def test_occupancy(registers, threads, shared, blocks):
    assert cubin.blocks(registers, threads, shared) == blocks


def test_launch_bounds_are_read():
    names = b"\0.shstrtab\0.nv.info.some_kernel\0"
    info = struct.pack("<BBH", 3, 0x1B, 255) + struct.pack("<BBHIII", 4, 5, 12, 32, 4, 2)
    head = 64
    at = head + len(names) + len(info)
    sections = [(0, 0, 0, 0, 0, 0), (1, 3, 0, 0, head, len(names)),
                (11, 1, 0, 0, head + len(names), len(info))]  # fmt: skip
    elf = bytearray(head)
    struct.pack_into("<Q", elf, 40, at)
    struct.pack_into("<HHH", elf, 58, 64, len(sections), 1)
    table = b"".join(struct.pack("<IIQQQQ", *s).ljust(64, b"\0") for s in sections)
    assert cubin.max_threads(bytes(elf) + names + info + table) == {"some_kernel": 256}


def test_what_got_worse_is_said():
    good = {"registers": 64, "blocks": 4, "stack": 0, "spilled": 0, "ldg_128": 3, "hmma": 8}
    bad = good | {"spilled": 8, "blocks": 3, "hmma": 9}
    del bad["ldg_128"]
    assert machine_code.worse({"k": good}, {"k": good}) == []
    assert machine_code.worse({"k": good}, {"k": bad}) == [
        "k: blocks 4 -> 3", "k: ldg_128 3 -> 0", "k: spilled 0 -> 8",
    ]  # fmt: skip


def test_the_shared_memory_is_there():
    of_triton = {name: row for name, row in KERNELS.items() if name.startswith("triton/")}
    large = {
        name: row["shared"]
        for name, row in of_triton.items()
        if row["shared"] > SHARED[name.partition(": ")[0].split("/")[2]] << 10
    }
    assert not large


@pytest.mark.parametrize("groups", BATCHES)
def test_compilers_make_what_was_committed(groups, tmp_path):
    source = groups[0].split("/")[0]
    if why := machine_code.missing(source):
        pytest.skip(why)
    compiler = machine_code.SOURCES[source].compiler()
    same = compiler == COMMITTED["compilers"][source]
    if same or source == "triton":  # by other versions of Triton they have to compile, too
        found = machine_code.measure(tmp_path, groups)["kernels"]
    if not same:
        pytest.skip(f"rows not compared: the table is of {COMMITTED['compilers'][source]}, "
                    f"this is {compiler}")  # fmt: skip
    for group in groups:
        assert machine_code.worse(COMMITTED["kernels"][group], found[group]) == []
    before = {group: COMMITTED["kernels"][group] for group in groups}
    assert found == before, "the code changed; if that is meant: make machine-code"

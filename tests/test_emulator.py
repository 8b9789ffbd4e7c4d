"""The emulator: each primitive does what PTX says, and each kind of bug is found where it is."""

import re
from pathlib import Path

import pytest
import torch
from cases import rand

from pyllm import emulator
from pyllm.cli import main

FOLDER = Path(__file__).parent / "emulator"
SEEDS = range(1, 6)
# Kernel: what the message says. The block has 32 or 64 threads.
PLANTED = {
    "missing_barrier": (64, "race at .* not ordered by a barrier"),
    "missing_second_barrier": (64, "race at .* not ordered by a barrier"),
    "missing_syncwarp": (32, "race at .* not ordered by a barrier"),
    "wrong_group_count": (32, "read of .* asynchronous copy .* has not delivered"),
    "copy_without_barrier": (32, "race at .* not ordered by a barrier"),
    "out_of_bounds_global": (
        64,
        "out-of-bounds read of 4 bytes .* at byte 256 of x, which has 256",
    ),
    "out_of_bounds_shared": (64, "out-of-bounds write of 4 bytes at byte 256 of .* 256 bytes"),
    "wild_pointer": (64, "out-of-bounds read"),
    "null_pointer": (64, "out-of-bounds read"),
    "inactive_lane": (32, "shuffle with mask 0xffffffff waits for lane 16, .*inactive lane"),
    "shuffle_outside_of_mask": (32, "shuffle reads lane .*, an inactive lane"),
    "different_masks": (32, "shuffle with mask .* but lane .* waits"),
    "misaligned": (32, "misaligned read of 16 bytes"),
    "misaligned_struct": (64, "misaligned read of 8 bytes"),
    "divergent_barrier": (64, "divergent barrier"),
    "two_barriers": (64, "divergent barrier"),
    "deadlock": (64, "deadlock: 64 of 64 threads wait"),
    "endless_wait": (64, "deadlock: 64 of 64 threads wait"),
    "past_static_array": (64, "out-of-bounds write of 4 bytes .* outside of every __shared__"),
    "before_static_array": (64, "out-of-bounds read of 4 bytes .* outside of every __shared__"),
    "copy_left_at_the_end": (32, "the block ended while this asynchronous copy was on its way"),
    "bulk_copy_left_at_the_end": (32, "the block ended while this asynchronous copy was on"),
    "global_without_barrier": (64, "race at .* in global memory: .* not ordered by a barrier"),
}
# The same for grids of two or three blocks.
PLANTED_BETWEEN_BLOCKS = {
    "blocks_write_together": "this write is not ordered by a fence and an atomic after the write",
    "blocks_share_no_order": "is not ordered by a fence and an atomic after the .* by block",
    "no_fence": "this read is not ordered by a fence and an atomic after the write by block",
    "no_barrier": "this read is not ordered by a fence and an atomic after the write by block",
    "no_counter": "race at byte .* of y in global memory",
}


@pytest.fixture(scope="module")
def planted():
    return emulator.compile(FOLDER / "planted.cu")


@pytest.fixture(scope="module")
def primitives():
    templates = ["mma16<f16>", "mma16<bf16>", "mma32<int8_t, int8_t>", "mma32<uint8_t, int8_t>"]
    plain = re.findall(r"^__global__ void (\w+)", (FOLDER / "primitives.cu").read_text(), re.M)
    names = [n for n in plain if not n.startswith(("mma16", "mma32"))]
    return emulator.compile(
        FOLDER / "primitives.cu", kernels=[*templates, *names, "mma16_transposed"]
    )


def bug_lines(kernel):
    """The lines of planted.cu marked BUG in this kernel."""
    inside, lines = False, []
    for number, line in enumerate((FOLDER / "planted.cu").read_text().splitlines(), 1):
        if line.startswith(("__global__", "__device__")):
            inside = f" {kernel}(" in line
        if inside and "// BUG" in line:
            lines.append(number)
    return lines


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_found(planted, name, seed):
    threads, message = PLANTED[name]
    x, y = rand(threads if name.endswith("global") else 128), torch.zeros(128)
    with pytest.raises(emulator.EmulatorError, match=message) as error:
        planted.launch(name, grid=1, block=threads, args=[x, y], shared_bytes=256, seed=seed)
    text = str(error.value)
    assert any(f"planted.cu:{line}:" in text or text.endswith(f"planted.cu:{line}") or
               f"planted.cu:{line} " in text for line in bug_lines(name)), text  # fmt: skip
    assert re.search(r"block \(0, 0, 0\), warp \d, lane \d+, thread \(\d+, 0, 0\)", text)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PLANTED_BETWEEN_BLOCKS)
def test_planted_bug_between_blocks_is_found(planted, name, seed):
    y = torch.zeros(128)
    with pytest.raises(emulator.EmulatorError, match=PLANTED_BETWEEN_BLOCKS[name]) as error:
        planted.launch(name, grid=2, block=32, args=[rand(64), y], seed=seed, threads=1 + seed % 2)
    text = str(error.value)
    lines = bug_lines("last_block_adds" if name.startswith("no_") else name)
    assert any(f"planted.cu:{line}:" in text for line in lines), text


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["last_block", "chain", "volatile_chain"])
def test_blocks_that_wait_for_each_other_do_not_race(planted, name, seed):
    x, y = rand(32), torch.zeros(128)
    planted.launch(name, grid=2, block=32, args=[x, y], seed=seed, threads=1 + seed % 2)
    total = y[64:96] if name == "last_block" else y[:32]
    assert torch.equal(total, 2 * x)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_correct_kernel_passes_and_errors_leave_nothing_behind(planted, seed):
    x, y = rand(64), torch.zeros(64)
    with pytest.raises(emulator.EmulatorError):
        planted.launch("missing_barrier", grid=1, block=64, args=[x, y], seed=seed)
    planted.launch("correct", grid=1, block=64, args=[x, y], seed=seed)
    assert torch.equal(y, x.flip(0))


def test_shared_memory_starts_poisoned(planted):
    y = torch.zeros(64)
    planted.launch("unwritten_shared", grid=1, block=64, args=[rand(64), y])
    assert torch.equal(torch.isnan(y), torch.arange(64) >= 32)


def test_the_first_block_that_fails_is_reported(planted):
    for threads in (1, 2):
        with pytest.raises(emulator.EmulatorError, match=r"block \(0, 0, 0\)"):
            planted.launch(
                "missing_barrier", grid=9, block=64, args=[rand(64), rand(64)], threads=threads
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 1025}, "a block of 1025 x 1 x 1 threads; expected 1 to 1024"),
        ({"block": 0}, "a block of 0 x 1 x 1 threads"),
        ({"grid": 0}, "a grid of 0 x 1 x 1 blocks"),
        ({"shared_bytes": 1 << 20}, "1048576 bytes of shared memory; a block has 232448"),
    ],
)
def test_bad_launches(planted, changes, message):
    launch = {"grid": 1, "block": 64, "args": [rand(64), rand(64)], **changes}
    with pytest.raises(emulator.EmulatorError, match=message):
        planted.launch("correct", **launch)


@pytest.mark.parametrize(
    ("defines", "message"), [([], None), (["PLAIN"], None), (["RACE"], "race at")]
)
def test_the_example_by_the_command_line(defines, message, capsys):
    source = Path(__file__).parents[1] / "examples" / "transpose.cu"
    flags = [f for name in defines for f in ("-D", name)]
    assert main(["emulate", str(source), "--seeds", "2", *flags]) == (2 if message else 0)
    printed = capsys.readouterr()
    if message:
        assert message in printed.err
    else:
        written = re.search(r"global write +(\d+) +(\d+) +([0-9.]+)", printed.out).groups()
        assert written == (("512", "16384", "8.00") if defines else ("512", "2048", "1.00"))


def launch(program, name, *args, grid=1, block=32, shared_bytes=0):
    """Runs under several orders of lanes."""
    for seed in SEEDS:
        program.launch(
            name, grid=grid, block=block, args=args, shared_bytes=shared_bytes, seed=seed
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma_of_halves(primitives, dtype):
    a, b = rand(16, 16, dtype=dtype), rand(8, 16, dtype=dtype, seed=1)
    c = torch.full((16, 8), float("nan"))
    launch(primitives, "mma16<f16>" if dtype == torch.float16 else "mma16<bf16>", a, b, c)
    assert torch.allclose(c.double(), a.double() @ b.double().T, rtol=1e-6, atol=1e-5)
    if dtype == torch.float16:
        launch(primitives, "mma16_transposed", a, b.T.contiguous(), c)
        assert torch.allclose(c.double(), a.double() @ b.double().T, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("name", "low", "high"), [("int8_t", -128, 128), ("uint8_t", 0, 256)])
def test_mma_of_bytes_is_exact(primitives, name, low, high):
    dtype = torch.int8 if low < 0 else torch.uint8
    a = torch.randint(low, high, (16, 32)).to(dtype)
    b = torch.randint(-128, 128, (8, 32)).to(torch.int8)
    c = torch.zeros(16, 8, dtype=torch.int32)
    launch(primitives, f"mma32<{name}, int8_t>", a, b, c)
    assert torch.equal(c, a.int() @ b.int().T)


def test_warp_functions(primitives):
    x = torch.randint(-50, 50, (32,), dtype=torch.int32)
    y = torch.zeros(10, 32, dtype=torch.int32)
    launch(primitives, "warp_functions", x, y)
    lane, v = range(32), x.tolist()
    bits = lambda chosen: sum(1 << i for i in lane if chosen(i))  # noqa: E731
    signed = lambda u: u - (1 << 32) if u >= 1 << 31 else u  # noqa: E731
    assert y[0].tolist() == [v[5]] * 32
    assert y[1].tolist() == [v[i - 3] if i >= 3 else v[i] for i in lane]
    assert y[2].tolist() == [v[i + 3] if i % 8 + 3 < 8 else v[i] for i in lane]
    assert y[3].tolist() == [v[i ^ 9] for i in lane]
    assert y[4].tolist() == [signed(bits(lambda i: v[i] > 0))] * 32
    assert y[5].tolist() == [1 + 2 * all(e > 0 for e in v)] * 32
    assert y[6].tolist() == [signed(bits(lambda j, i=i: v[i] & 3 == v[j] & 3)) for i in lane]
    assert y[7].tolist() == [0] * 32  # all lanes: -1, and the predicate
    assert y[8].tolist() == [sum(v)] * 32
    assert y[9].tolist() == [min(v)] * 32


def test_barriers_that_vote(primitives):
    x = torch.randint(-50, 50, (96,), dtype=torch.int32)
    y = torch.zeros(96, dtype=torch.int32)
    launch(primitives, "block_functions", x, y, block=96)
    assert y.tolist() == [int((x > 0).sum()) * 4 + 2] * 96


def test_atomics_of_many_blocks(primitives):
    x = torch.randint(0, 1000, (5000,), dtype=torch.int32)
    counts, largest = torch.zeros(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    primitives.launch("histogram", grid=9, block=64, args=[x, 5000, counts, largest], threads=2)
    assert torch.equal(counts, torch.bincount(x & 7, minlength=8).int())
    assert largest.item() == x.max()


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_may_wait_for_those_before_them(primitives, threads):
    done, y = torch.zeros(12, dtype=torch.int32), torch.zeros(12, 32)
    primitives.launch("chain", grid=12, block=32, args=[done, y], threads=threads)
    assert torch.equal(y, torch.arange(12.0)[:, None].expand(12, 32))
    with pytest.raises(emulator.EmulatorError, match="deadlock"):
        primitives.launch("backward_chain", grid=5, block=32, args=[done * 0, y])


def test_roles_and_asynchronous_copies(primitives):
    x, y = rand(10 * 128), torch.zeros(10 * 128)
    launch(primitives, "pipeline", x, y, 10, block=64)
    assert torch.equal(y.view(10, 128), x.view(10, 128).flip(1))
    launch(primitives, "bulk", x, y, block=256)
    assert torch.equal(y[:256], x[:256].flip(0))
    launch(primitives, "named_barriers", x, y, block=128)
    assert torch.equal(y[:192].view(3, 64), x[:192].view(3, 64).flip(1))
    launch(primitives, "cp_async_zero_fill", x[:77].clone(), y, 77)
    assert torch.equal(y[:128], torch.cat([x[:77], torch.zeros(51)]))


def test_conversions(primitives):
    exponents = torch.arange(-30, 20).float().exp2()
    x = torch.cat(
        [rand(8 * 50).view(8, 50) * exponents, exponents[None], -exponents[None] * 1.0625]
    )
    x = torch.cat([x.flatten(), torch.tensor([0.0, -0.0, float("nan"), 448, 464, 1e9, -1e9])])
    x = torch.nn.functional.pad(x, (0, -x.numel() % 64))
    half, brain, e4m3, back = (torch.zeros_like(x) for _ in range(4))
    launch(primitives, "conversions", x, half, brain, e4m3, back, grid=x.numel() // 64, block=64)

    def same(a, b):
        return torch.equal(a.nan_to_num(7e9), b.nan_to_num(7e9))

    assert same(half, x.half().float())
    assert same(back, x.half().float())
    assert same(brain, x.bfloat16().float())
    assert same(e4m3, x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(("stride", "wavefronts", "sectors"), [(1, 1, 4), (2, 2, 8), (3, 1, 12),
                                                               (32, 32, 32)])  # fmt: skip
def test_bank_conflicts_and_sectors_are_counted(primitives, stride, wavefronts, sectors):
    y = torch.zeros(1024)
    done = primitives.launch("strides", grid=1, block=32, args=[y, stride], shared_bytes=4096)
    shared, memory = done.lines()
    assert (shared["space"], shared["transactions"]) == ("shared", wavefronts)
    assert (memory["space"], memory["transactions"]) == ("global", sectors)
    assert done.traffic["buffers"]["y"]["written"] == 128
    source = (FOLDER / "primitives.cu").read_text().splitlines()
    assert "tile[threadIdx.x * stride] = 1.0f" in source[int(shared["source"].split(":")[1]) - 1]

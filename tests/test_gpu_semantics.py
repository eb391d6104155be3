"""``gpu_semantics``: it finds what is planted in small kernels, and nothing in kernels that are right.

As in ``test_triton_kernels.py`` the interpreter needs a process of its own, which a test at the end starts.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="the interpreter is Triton's")

import triton.language as tl  # noqa: E402
from gpu_arithmetic import ULPS  # noqa: E402
from gpu_semantics import GpuSemantics, check_as_on_a_gpu, run_in_the_interpreter  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that a test at the end starts")
starts_a_process = pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")


@pytest.fixture
def gpu() -> Iterator[GpuSemantics]:
    with GpuSemantics(0).active() as semantics:
        yield semantics


def found(gpu: GpuSemantics) -> list[str]:
    """The findings without the kernel, its line and that line's caller."""
    return [finding.split(maxsplit=4)[4] for finding in gpu.findings]


# What kernels do with memory.


@triton.jit
def reverse_kernel(x, out, N: tl.constexpr, BARRIER: tl.constexpr):
    """Every program turns N elements of its own around, by memory."""
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + i, tl.load(x + i))
    if BARRIER:
        tl.debug_barrier()
    turned = tl.load(out + tl.program_id(0) * N + N - 1 - tl.arange(0, N))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + i, turned)


@interpreted
def test_a_kernel_with_its_barriers_is_right_and_has_no_findings(gpu):
    x, out = torch.randn(32), torch.empty(32)
    reverse_kernel[(4,)](x, out, 8, True)
    assert torch.equal(out, x.view(4, 8).flip(1).flatten())
    assert not gpu.findings
    assert (gpu.launches, gpu.programs) == (1, 4)


@interpreted
def test_races_within_a_program_are_found(gpu):
    reverse_kernel[(4,)](torch.randn(32), torch.empty(32), 8, False)
    findings = sorted(re.sub(r"\S+:\d+ < ", "", finding) for finding in gpu.findings)
    line = r"test_gpu_semantics\.py:\d+"
    # What was stored is loaded, and what was stored and loaded is stored over.
    pattern = "reverse_kernel: {0} {1} what {0} {2} with no barrier between"
    assert len(findings) == 3
    for finding, does in zip(findings, [("reads", "writes"), ("writes", "reads"), ("writes", "writes")], strict=True):
        assert re.fullmatch(pattern.format(line, *does), finding)
    assert set(gpu.findings.values()) == {4}


@triton.jit
def add_kernel(x, y, N: tl.constexpr, OTHERS: tl.constexpr):
    i = tl.arange(0, N)
    if OTHERS == "before":
        tl.store(y + i, tl.load(x + N - 1 - i))
    if OTHERS == "one":
        tl.store(y + i, tl.load(x))
    own = tl.load(x + i)
    if OTHERS == "after":
        tl.store(y + i, tl.load(x + N - 1 - i))
    if OTHERS == "together":
        tl.store(y + i, tl.load(x + i // 2))
    tl.store(x + i, own + 1.0)


@interpreted
@pytest.mark.parametrize("others", ["none", "before", "after", "together", "one"])
def test_a_lane_may_store_over_what_no_other_has_loaded(others, gpu):
    add_kernel[(1,)](torch.zeros(8), torch.empty(8), 8, others)
    assert len(gpu.findings) == (others != "none")


@triton.jit
def shared_kernel(x, out, WRITE: tl.constexpr, READ: tl.constexpr, ATOMIC: tl.constexpr):
    """Every program writes, reads or changes ``x[0]``."""
    own = tl.program_id(0)
    if READ:
        tl.store(out + own, tl.load(x))
    tl.debug_barrier()
    if WRITE:
        tl.store(x, own)
    tl.debug_barrier()
    if ATOMIC == "add":
        tl.atomic_add(x, 1)
    if ATOMIC == "swap":
        tl.atomic_cas(x, own, own + 1)


@interpreted
@pytest.mark.parametrize(
    ("does", "races"),
    [
        ((True, False, ""), {"writes what writes"}),
        ((True, True, ""), {"writes what writes", "writes what reads", "reads what writes"}),
        ((True, False, "add"), {"writes what writes", "writes what changes", "changes what writes"}),
        ((False, True, "add"), {"reads what changes", "changes what reads"}),
        ((False, True, "swap"), {"reads what changes", "changes what reads"}),
        ((False, True, ""), set()),
        ((False, False, "add"), set()),
        ((False, False, "swap"), set()),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else " and ".join(sorted(value)) or "none",
)
def test_races_between_programs_are_found(does, races, gpu):
    shared_kernel[(5,)](torch.zeros(1, dtype=torch.int32), torch.empty(5, dtype=torch.int32), *does)
    assert all(finding.endswith(" in another program") for finding in gpu.findings)
    pattern = r"(writes|reads|changes).* what .* (writes|reads|changes)"
    assert {" what ".join(re.search(pattern, finding).groups()) for finding in gpu.findings} == races


@triton.jit
def last_kernel(x, counter, out, N: tl.constexpr, BARRIER: tl.constexpr, SEM: tl.constexpr):
    """Every program writes elements of its own; the last, or without ``SEM`` any, reads all."""
    own = tl.program_id(0)
    tl.store(x + own * N + tl.arange(0, N), own)
    if BARRIER:
        tl.debug_barrier()
    last = True
    if SEM is not None:
        last = tl.atomic_add(counter, 1, sem=SEM) == tl.num_programs(0) - 1
    if last:
        i = tl.arange(0, N)
        total = tl.zeros([N], dtype=tl.int32)
        for program in range(tl.num_programs(0)):
            total += tl.load(x + program * N + i)
        tl.store(out + own * N + i, total)


@interpreted
@pytest.mark.parametrize(
    ("barrier", "sem", "right"),
    [(True, "acq_rel", True), (False, "acq_rel", False), (True, "relaxed", False), (True, None, False)],
)
def test_the_last_program_may_read_what_others_have_released(barrier, sem, right, gpu):
    x, out = torch.zeros(40, dtype=torch.int32), torch.zeros(40, dtype=torch.int32)
    last_kernel[(5,)](x, torch.zeros(1, dtype=torch.int32), out, 8, barrier, sem)
    assert bool(gpu.findings) != right
    if sem is not None:
        assert out.sum() == 8 * sum(range(5))
    if sem != "acq_rel":
        assert all(finding.endswith(" in another program") for finding in gpu.findings)


@triton.jit
def overlay_kernel(whole, halves):
    """One program writes four bytes, another the last two of them."""
    if tl.program_id(0) == 0:
        tl.store(whole, 1)
    else:
        tl.store(halves + 1, 1)


@interpreted
def test_a_race_of_different_types_is_found(gpu):
    whole = torch.zeros(1, dtype=torch.int32)
    overlay_kernel[(2,)](whole, whole.view(torch.int16))
    assert re.fullmatch(r"writes what .* writes in another program", *found(gpu))


@triton.jit
def scatter_kernel(out, values, N: tl.constexpr):
    tl.store(out + tl.arange(0, N) // 2, tl.load(values + tl.arange(0, N)))


@interpreted
def test_a_store_of_different_values_to_one_address_is_found_and_of_equal_ones_is_not(gpu):
    scatter_kernel[(1,)](torch.empty(4), torch.arange(8) // 2 * 0.5, 8)
    assert not gpu.findings
    scatter_kernel[(1,)](torch.empty(4), torch.arange(8) * 0.5, 8)
    assert found(gpu) == ["writes different values to one address"]


@triton.jit
def ticket_kernel(counter, out):
    """Which programs come first shows in the result."""
    tl.store(out + tl.atomic_add(counter, 1), tl.program_id(0) + 10 * tl.program_id(1))


@interpreted
def test_programs_run_once_each_in_an_order_of_the_seed():
    orders = []
    for seed in (1, 1, 2):
        counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(15, dtype=torch.int32)
        with GpuSemantics(seed).active() as gpu:
            ticket_kernel[(5, 3)](counter, out)
        assert not gpu.findings
        orders.append(out.tolist())
    every = [x + 10 * y for x in range(5) for y in range(3)]
    assert orders[0] == orders[1]
    assert len({tuple(every), *map(tuple, orders)}) == 3
    assert [sorted(order) for order in orders] == [sorted(every)] * 3


@triton.jit
def copy_kernel(x, out, count, N: tl.constexpr, OTHER: tl.constexpr):
    i = tl.arange(0, N)
    if OTHER:
        tl.store(out + i, tl.load(x + i, mask=i < count, other=0))
    else:
        tl.store(out + i, tl.load(x + i, mask=i < count))


@interpreted
@pytest.mark.parametrize("make", ["empty", "empty_like", "new_empty"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64], ids=str
)
def test_reading_what_nothing_wrote_is_found_unless_it_is_masked(dtype, make, gpu):
    like = torch.zeros(24, dtype=dtype)
    x = {
        "empty": lambda: torch.empty(24, dtype=dtype),
        "empty_like": lambda: torch.empty_like(like),
        "new_empty": lambda: like.new_empty(24),
    }[make]()
    x[:20] = torch.arange(20)
    copy_kernel[(1,)](x, torch.zeros(32, dtype=dtype), 20, 32, True)
    assert not gpu.findings
    copy_kernel[(1,)](x, torch.zeros(32, dtype=dtype), 21, 32, True)
    assert found(gpu) == ["reads memory that nothing has written"]


@triton.jit
def write_and_read_kernel(memory, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(memory + i, i)
    tl.debug_barrier()
    tl.store(out + i, tl.load(memory + i))


@interpreted
def test_reading_what_the_same_launch_wrote_is_no_finding(gpu):
    write_and_read_kernel[(1,)](torch.empty(8, dtype=torch.int32), torch.empty(8, dtype=torch.int32), 8)
    assert not gpu.findings


@interpreted
def test_what_a_mask_leaves_out_is_not_zero_unless_the_kernel_says_so(gpu):
    for other in (True, False):
        out = torch.zeros(8)
        copy_kernel[(1,)](torch.ones(8), out, 5, 8, other)
        assert out[:5].eq(1).all()
        assert bool(out[5:].eq(0).all()) is other


@interpreted
def test_leaving_the_tensors_is_found_and_does_not_happen(gpu):
    out = torch.zeros(24, dtype=torch.int32)
    copy_kernel[(1,)](torch.full((24,), 7, dtype=torch.int32), out, 24, 32, True)
    assert out.eq(7).all()
    assert found(gpu) == ["writes outside the tensors that it was given"]
    gpu.findings.clear()
    copy_kernel[(1,)](out, torch.zeros(32, dtype=torch.int32), 25, 32, True)
    assert found(gpu) == ["reads outside the tensors that it was given"]


# Arithmetic.


@triton.jit
def unary_kernel(x, out, N: tl.constexpr, OPERATION: tl.constexpr):
    i = tl.arange(0, N)
    y = tl.load(x + i)
    if OPERATION == "divide":
        y = y / 3.0
    elif OPERATION == "exp2":
        y = tl.exp2(y)
    elif OPERATION == "log2":
        y = tl.log2(y)
    elif OPERATION == "sqrt":
        y = tl.sqrt(y)
    elif OPERATION == "cast":
        y = y.to(out.dtype.element_ty)
    tl.store(out + i, y)


INEXACT = {"divide": lambda x: x / 3, "exp2": torch.exp2, "log2": torch.log2, "sqrt": torch.sqrt}


@interpreted
@pytest.mark.parametrize("name", INEXACT)
def test_division_roots_powers_and_logarithms_are_off_by_two_units_at_most(name):
    x = torch.rand(1024) * 6 + 2
    exact = INEXACT[name](x.double())
    results = []
    for seed in (1, 1, 2):
        out = torch.empty(1024)
        with GpuSemantics(seed).active():
            unary_kernel[(1,)](x, out, 1024, name)
        results.append(out)
    unit = torch.from_numpy(np.spacing(exact.float().numpy())).double()
    for out in results:
        off = (out.double() - exact).abs() / unit
        assert 1 < off.max() <= ULPS
        assert (out != exact.float()).double().mean() > 0.4
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@interpreted
def test_powers_of_two_are_exact_at_zero_and_flushed_below_the_normal_numbers(gpu):
    out = torch.empty(4)
    unary_kernel[(1,)](torch.tensor([0.0, -0.0, -127.5, -torch.inf]), out, 4, "exp2")
    assert out.tolist() == [1, 1, 0, 0]


@interpreted
def test_casts_to_integers_saturate_in_sixteen_bits_at_least(gpu):
    x = torch.tensor([3e9, -3e9, torch.nan, torch.inf, -2.9, 200.7, 40000.0, -200.0])
    for dtype, expected in {
        torch.int32: [2**31 - 1, -(2**31), 0, 2**31 - 1, -2, 200, 40000, -200],
        torch.int16: [2**15 - 1, -(2**15), 0, 2**15 - 1, -2, 200, 2**15 - 1, -200],
        torch.int8: [-1, 0, 0, -1, -2, 200 - 256, -1, 256 - 200],
        torch.uint8: [255, 0, 0, 255, 0, 200, 40000 % 256, 0],
    }.items():
        out = torch.empty(8, dtype=dtype)
        unary_kernel[(1,)](x, out, 8, "cast")
        assert out.tolist() == expected


@interpreted
def test_bfloat16_is_rounded_to_nearest_even(gpu):
    ties = 1 + torch.arange(-8, 8) / 256
    x = torch.cat([ties, -ties, torch.randn(29), torch.tensor([torch.nan, torch.inf, 3.4e38])])
    out = torch.empty(64, dtype=torch.bfloat16)
    unary_kernel[(1,)](x, out, 64, "cast")
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def binary_kernel(x, y, out, N: tl.constexpr, OPERATION: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    if OPERATION == "maximum":
        c = tl.maximum(a, b)
    elif OPERATION == "minimum":
        c = tl.minimum(a, b)
    elif OPERATION == "product-plus":
        c = a * a + b
    elif OPERATION == "plus-product":
        c = b + a * a
    elif OPERATION == "product-minus":
        c = a * a - b
    else:
        c = b - a * a
    tl.store(out + i, c)


@interpreted
@pytest.mark.parametrize(("name", "expected"), [("maximum", [1, 2, 4]), ("minimum", [1, 2, 3])])
def test_maximum_and_minimum_drop_nan(name, expected, gpu):
    x, y = torch.tensor([torch.nan, 2.0, 3.0, torch.nan]), torch.tensor([1.0, torch.nan, 4.0, torch.nan])
    out = torch.empty(4)
    binary_kernel[(1,)](x, y, out, 4, name)
    assert out[:3].tolist() == expected
    assert out[3].isnan()


@interpreted
@pytest.mark.parametrize(
    ("name", "of_product", "of_other"),
    [("product-plus", 1, 1), ("plus-product", 1, 1), ("product-minus", 1, -1), ("minus-product", -1, 1)],
)
def test_a_product_that_is_added_is_not_rounded_first(name, of_product, of_other, gpu):
    x = torch.rand(64) + 1
    y = -of_product * of_other * x * x
    out = torch.empty(64)
    binary_kernel[(1,)](x, y, out, 64, name)
    exact = of_product * x.double() ** 2 + of_other * y.double()
    assert torch.equal(out.double(), exact)  # what rounding x * x took away, which float32 holds
    assert out.count_nonzero() > 32


@triton.jit
def reduce_kernel(x, out, N: tl.constexpr, OPERATION: tl.constexpr):
    tile = tl.load(x + tl.arange(0, 2)[:, None] * N + tl.arange(0, N)[None, :])
    if OPERATION == "max":
        y = tl.max(tile, axis=1)
    elif OPERATION == "min":
        y = tl.min(tile, axis=1)
    else:
        y = tl.sum(tile, axis=1)
    tl.store(out + tl.arange(0, 2), y)


@interpreted
@pytest.mark.parametrize(("name", "expected"), [("max", 3.0), ("min", -1.0)])
def test_maxima_and_minima_drop_nan(name, expected, gpu):
    out = torch.empty(2)
    reduce_kernel[(1,)](torch.tensor([[torch.nan, 3.0, -1.0, 2.0], [torch.nan] * 4]), out, 4, name)
    assert out[0] == expected
    assert out[1].isnan()


@interpreted
def test_sums_are_folded_in_halves(gpu):
    out = torch.empty(2)
    reduce_kernel[(1,)](torch.tensor([[1e8, 1.0, -1e8, 1.0], [1.0, 1e8, 1.0, -1e8]]), out, 4, "sum")
    assert out.tolist() == [2, 2]  # one after the other would give 1 and 0


@triton.jit
def product_kernel(x, y, out, K: tl.constexpr):
    i, k = tl.arange(0, 16), tl.arange(0, K)
    product = tl.dot(tl.load(x + i[:, None] * K + k[None, :]), tl.load(y + k[:, None] * 16 + i[None, :]))
    tl.store(out + i[:, None] * 16 + i[None, :], product)


@interpreted
def test_matrix_products_are_cut_toward_zero(gpu):
    x, y, out = torch.rand(16, 64), torch.rand(64, 16), torch.empty(16, 16)
    for sign in (1, -1):
        product_kernel[(1,)](sign * x, y, out, 64)
        exact = x.double() @ y.double()
        lost = (exact - sign * out.double()) / exact
        assert (lost > 0).all()
        assert lost.max() < 4 * 2.0**-23
        assert (out != (sign * exact).float()).double().mean() > 0.5


# The switch.


@interpreted
def test_nothing_is_different_when_it_is_off():
    def state():
        owners = (interpreter.InterpreterBuilder, interpreter.ReduceOps, interpreter.GridExecutor)
        return [dict(vars(owner)) for owner in owners], torch.empty, torch.empty_like, torch.Tensor.new_empty

    before = state()
    with GpuSemantics(0).active() as gpu:
        assert state() != before
    assert state() == before
    shared_kernel[(5,)](torch.zeros(1, dtype=torch.int32), torch.empty(5, dtype=torch.int32), True, True, "add")
    assert not gpu.findings


@interpreted
@pytest.mark.parametrize("name", ["create_barrier", "set_grid_idx", "create_fmul"])
def test_what_the_interpreter_lacks_is_named(name, monkeypatch):
    monkeypatch.delattr(interpreter.InterpreterBuilder, name)
    message = rf"Triton {triton.__version__} has no InterpreterBuilder\.{name}"
    with pytest.raises(RuntimeError, match=message), GpuSemantics(0).active():
        pass


@starts_a_process
def test_kernels_that_are_compiled_are_refused():
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"), GpuSemantics(0).active():
        pass


RACE = """
import torch, triton, triton.language as tl

@triton.jit
def all_write_kernel(x):
    tl.store(x, tl.program_id(0))

def test_that_passes_with_a_race():
    all_write_kernel[(9,)](torch.zeros(1, dtype=torch.int32))

def test_that_fails_with_a_race():
    all_write_kernel[(9,)](torch.zeros(1, dtype=torch.int32))
    assert 1 == 2

def test_that_passes():
    all_write_kernel[(1,)](torch.zeros(1, dtype=torch.int32))
"""


@starts_a_process
def test_as_a_plugin_it_fails_the_test_with_findings(tmp_path):
    (tmp_path / "test_race.py").write_text(RACE)
    arguments = ("-rN", "-p", "gpu_semantics", str(tmp_path / "test_race.py"))  # each finding is said once
    done = run_in_the_interpreter(*arguments, GPU_SEMANTICS_SEED="5")
    assert done.returncode == 1
    assert "2 failed, 1 passed" in done.stdout
    assert "As on a GPU, with seed 5" in done.stdout
    assert "assert 1 == 2" in done.stdout
    assert len(re.findall(r"^all_write_kernel: test_race.py:6 .*another program \(8 times\)$", done.stdout, re.M)) == 2
    assert "gpu_semantics: 3 launches of 19 programs, seed 5" in done.stdout


@starts_a_process
def test_every_case_in_the_interpreter():
    done = run_in_the_interpreter(__file__)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-2000:]


# With seed 0 each file runs itself.
KERNEL_TESTS = [
    file
    for file in sorted(Path(__file__).parent.glob("test_triton_*.py"))
    if check_as_on_a_gpu.__name__ in file.read_text()
]


@pytest.mark.wide
@starts_a_process
@pytest.mark.parametrize("seed", ["1", "2"])
@pytest.mark.parametrize("file", KERNEL_TESTS, ids=lambda file: file.stem)
def test_kernels_as_on_a_gpu_with_other_seeds(file, seed):
    check_as_on_a_gpu(str(file), GPU_SEMANTICS_SEED=seed)

"""``gpu_semantics``: it finds what is planted in small kernels, and nothing in kernels that are right."""

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="the interpreter is Triton's")

import triton.language as tl  # noqa: E402
from gpu_arithmetic import ULPS  # noqa: E402
from gpu_semantics import GpuSemantics  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="test_interpreter.py runs this file")


@pytest.fixture
def gpu() -> Iterator[GpuSemantics]:
    with GpuSemantics(0).active() as semantics:
        yield semantics


def found(gpu: GpuSemantics) -> set[str]:
    """The findings without the kernel and lines, which are then forgotten."""
    lines = {re.sub(r"\S+:\d+( < \S+:\d+)? ", "", finding.split(maxsplit=1)[1]) for finding in gpu.findings}
    gpu.findings.clear()
    return lines


@triton.jit
def memory_kernel(x, out, counter, N: tl.constexpr, DOES: tl.constexpr):
    """Every program does something with ``x`` and ``out``, of N elements for each."""
    own, i = tl.program_id(0), tl.arange(0, N)
    mine = own * N + i
    if DOES == "turn" or DOES == "turn with a barrier":  # its elements around, by memory
        tl.store(x + mine, own)
        if DOES == "turn with a barrier":
            tl.debug_barrier()
        tl.store(out + mine, tl.load(x + own * N + N - 1 - i))
    elif DOES == "add":  # to what the same lane has read
        tl.store(x + mine, tl.load(x + mine) + 1.0)
    elif DOES == "add to what others read":
        first = tl.load(x + mine)
        tl.store(out + mine, tl.load(x + own * N + i // 2))
        tl.store(x + mine, first + 1.0)
    elif DOES == "all write one":
        tl.store(x, own)
    elif DOES == "read and change":
        tl.store(out + own, tl.load(x))
        tl.debug_barrier()
        tl.atomic_add(x, 1)
    elif DOES == "change":
        tl.atomic_cas(x, own, own + 1)
        tl.debug_barrier()
        tl.atomic_add(x, 1)
    elif DOES == "two write one":
        tl.store(out + i // 2, i)
    elif DOES == "two write one the same":
        tl.store(out + i // 2, i // 2)
    else:  # the last program reads what all have written
        tl.store(x + mine, own)
        if DOES != "last without a barrier":
            tl.debug_barrier()
        order: tl.constexpr = "relaxed" if DOES == "last relaxed" else "acq_rel"
        if tl.atomic_add(counter, 1, sem=order) == tl.num_programs(0) - 1:
            for program in range(tl.num_programs(0)):
                tl.store(out + mine, tl.load(out + mine) + tl.load(x + program * N + i))
                tl.debug_barrier()


WITHIN, BETWEEN = " with no barrier between", " in another program"


@pytest.mark.parametrize(
    ("does", "programs", "races"),
    [
        ("turn with a barrier", 4, set()),
        ("turn", 4, {f"reads what writes{WITHIN}"}),
        ("add", 1, set()),
        ("add to what others read", 1, {f"writes what reads{WITHIN}"}),
        ("two write one", 1, {"writes different values to one address"}),
        ("two write one the same", 1, set()),
        ("all write one", 5, {f"writes what writes{BETWEEN}"}),
        ("read and change", 5, {f"reads what changes atomically{BETWEEN}", f"changes atomically what reads{BETWEEN}"}),
        ("change", 5, set()),
        ("last with a barrier", 5, set()),
        ("last without a barrier", 5, {f"reads what writes{BETWEEN}"}),
        ("last relaxed", 5, {f"reads what writes{BETWEEN}"}),
    ],
)
def test_races_are_found_and_what_is_ordered_is_none(does, programs, races, gpu):
    x, out, counter = torch.zeros(40), torch.zeros(40), torch.zeros(1, dtype=torch.int32)
    if does.startswith(("last", "change", "read and", "all")):
        x, out = x.int(), out.int()
    memory_kernel[(programs,)](x, out, counter, 8, does)
    assert found(gpu) == races
    assert (gpu.launches, gpu.programs) == (1, programs)
    if does == "last with a barrier":
        assert out.sum() == 8 * sum(range(5))


@triton.jit
def ticket_kernel(counter, out):
    """Which programs come first shows in the result."""
    tl.store(out + tl.atomic_add(counter, 1), tl.program_id(0) + 10 * tl.program_id(1))


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


@pytest.mark.parametrize(
    "make", [lambda like: torch.empty_like(like), lambda like: like.new_empty(24)], ids=["empty_like", "new_empty"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64], ids=str)
def test_reading_what_nothing_wrote_is_found_unless_it_is_masked(dtype, make, gpu):
    x, out = make(torch.zeros(24, dtype=dtype)), torch.empty(32, dtype=dtype)
    x[:20] = torch.arange(20)
    copy_kernel[(1,)](x, out, 20, 32, True)
    assert not gpu.findings
    copy_kernel[(1,)](x, out, 21, 32, True)
    assert found(gpu) == {"reads memory that nothing has written"}


def test_what_a_mask_leaves_out_is_not_zero_and_leaving_the_tensors_does_not_happen(gpu):
    for other in (True, False):
        out = torch.zeros(8)
        copy_kernel[(1,)](torch.ones(8), out, 5, 8, other)
        assert out[:5].eq(1).all()
        assert bool(out[5:].eq(0).all()) is other
    out = torch.zeros(24, dtype=torch.int32)
    copy_kernel[(1,)](torch.full((24,), 7, dtype=torch.int32), out, 24, 32, True)
    assert out.eq(7).all()
    assert found(gpu) == {"writes outside the tensors that it was given"}
    copy_kernel[(1,)](out, torch.zeros(32, dtype=torch.int32), 25, 32, True)
    assert found(gpu) == {"reads outside the tensors that it was given"}


@triton.jit
def arithmetic_kernel(x, y, out, N: tl.constexpr, DOES: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    c = a
    if DOES == "divide":
        c = a / 3.0
    elif DOES == "exp2":
        c = tl.exp2(a)
    elif DOES == "maximum":
        c = tl.maximum(a, b)
    elif DOES == "product-plus":
        c = a * a + b
    elif DOES == "minus-product":
        c = b - a * a
    elif DOES == "sum":
        c = tl.sum(a, axis=0) + tl.zeros_like(a)
    elif DOES == "dot":  # of 16 by 64 and 64 by 16 numbers
        row, k = tl.arange(0, 16), tl.arange(0, 64)
        left, right = tl.load(x + row[:, None] * 64 + k), tl.load(y + k[:, None] * 16 + row[None, :])
        tl.store(out + row[:, None] * 16 + row[None, :], tl.dot(left, right))
    if DOES != "dot":
        tl.store(out + i, c.to(out.dtype.element_ty))


def computed(does: str, x: torch.Tensor, y: torch.Tensor | None = None, dtype: torch.dtype = torch.float32):
    out = torch.zeros(x.shape, dtype=dtype)
    arithmetic_kernel[(1,)](x, x if y is None else y, out, len(x), does)
    return out


@pytest.mark.parametrize("name", ["divide", "exp2"])
def test_division_and_powers_are_off_by_two_units_at_most(name):
    x, results = torch.rand(1024) * 6 + 2, []
    exact = torch.exp2(x.double()) if name == "exp2" else x.double() / 3
    for seed in (1, 1, 2):
        with GpuSemantics(seed).active():
            results.append(computed(name, x))
    unit = torch.from_numpy(np.spacing(exact.float().numpy())).double()
    for out in results:
        assert 1 < ((out.double() - exact).abs() / unit).max() <= ULPS
        assert (out != exact.float()).double().mean() > 0.4
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_special_numbers_and_casts_are_those_of_ptx(gpu):
    assert computed("exp2", torch.tensor([0.0, -0.0, -127.5, -torch.inf])).tolist() == [1, 1, 0, 0]
    x, y = torch.tensor([torch.nan, 2.0, 3.0, 5.0]), torch.tensor([1.0, torch.nan, 4.0, 5.0])
    assert computed("maximum", x, y).tolist() == [1, 2, 4, 5]
    wide, (low, high) = (
        torch.tensor([3e9, -3e9, torch.nan, -torch.inf, -2.9, 200.7, 40000.0, -200.0]),
        (-(2**31), 2**31 - 1),
    )
    assert computed("cast", wide, dtype=torch.int32).tolist() == [high, low, 0, low, -2, 200, 40000, -200]
    assert computed("cast", wide, dtype=torch.int8).tolist() == [-1, 0, 0, 0, -2, 200 - 256, -1, 256 - 200]
    ties = torch.cat([1 + torch.arange(-8, 8) / 256, torch.randn(13), torch.tensor([torch.nan, torch.inf, 3.4e38])])
    rounded = computed("cast", ties, dtype=torch.bfloat16)
    torch.testing.assert_close(rounded, ties.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_products_and_sums_are_rounded_as_on_a_gpu(gpu):
    x = torch.rand(64) + 1
    rounded = (x.double() ** 2 - (x * x).double()).float()  # what rounding x * x takes away, which float32 holds
    assert rounded.count_nonzero() > 32
    assert torch.equal(computed("product-plus", x, -x * x), rounded)
    assert torch.equal(computed("minus-product", x, x * x), -rounded)
    # Folded in halves; one after the other would give 1.
    assert computed("sum", torch.tensor([1e8, 1.0, -1e8, 1.0])).tolist() == [2] * 4
    x, y = torch.rand(16, 64), torch.rand(64, 16)
    exact = x.double() @ y.double()
    for sign in (1, -1):
        out = sign * computed("dot", sign * x.flatten(), y.flatten())[:256].view(16, 16).double()
        lost = (exact - out) / exact
        assert (lost > 0).all()
        assert lost.max() < 4 * 2.0**-23
        assert (out != exact.float()).double().mean() > 0.5


def test_nothing_is_different_when_it_is_off_and_what_the_interpreter_lacks_is_named(monkeypatch):
    def state():
        builders = interpreter.interpreter_builder, interpreter.interpreter_semantic.builder
        owners = [dict(vars(owner)) for owner in (interpreter.ReduceOps, interpreter.GridExecutor)]
        return builders, owners, torch.empty, torch.empty_like, torch.Tensor.new_empty

    before = state()
    with GpuSemantics(0).active():
        assert state() != before
    assert state() == before
    monkeypatch.delattr(interpreter.InterpreterBuilder, "create_barrier")
    message = rf"Triton {triton.__version__} has no InterpreterBuilder\.create_barrier"
    with pytest.raises(RuntimeError, match=message), GpuSemantics(0).active():
        pass

"""``gpu_semantics``: it finds what is planted in small kernels. That it finds nothing else, the library's own show."""

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from gpu_arithmetic import ULPS
from gpu_semantics import GpuSemantics

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="test_interpreter.py runs this file")


@triton.jit
def wrong_kernel(x, out, new, N: tl.constexpr, DOES: tl.constexpr):
    """Every program does something wrong with ``x`` and ``out``, of N elements for each."""
    own, i = tl.program_id(0), tl.arange(0, N)
    mine = own * N + i
    if DOES == "turn":  # its elements around, by memory
        tl.store(x + mine, own)
        tl.store(out + mine, tl.load(x + own * N + N - 1 - i))
    elif DOES == "add to what others read":
        first = tl.load(x + mine)
        tl.store(out + mine, tl.load(x + own * N + i // 2))
        tl.store(x + mine, first + 1)
    elif DOES == "all write one":
        tl.store(x, own)
    elif DOES == "read and change":
        tl.store(out + own, tl.load(x))
        tl.debug_barrier()
        tl.atomic_add(x, 1)
    elif DOES == "two write one":
        tl.store(out + mine // 2 * 2, i)
    elif DOES == "read beyond":
        tl.store(out + mine, tl.load(x + 5 * N + i))
    elif DOES == "write beyond":
        tl.store(out + 5 * N + mine, i)
    elif DOES == "read what is new":
        tl.store(out + mine, tl.load(new + 1 + i, mask=i < N - 1, other=0))
    else:  # the last program reads what another has written
        tl.store(x + mine, own)
        if DOES == "last relaxed":
            tl.debug_barrier()
        order: tl.constexpr = "relaxed" if DOES == "last relaxed" else "acq_rel"
        if tl.atomic_add(new, 1, sem=order) == tl.num_programs(0) - 1:
            tl.store(out + mine, tl.load(x + (own + 1) % 5 * N + i))


ATOMICALLY = ("changes atomically what reads", "reads what changes atomically")


@pytest.mark.parametrize(
    ("does", "finds"),
    [
        ("turn", {"reads what writes with no barrier between"}),
        ("add to what others read", {"writes what reads with no barrier between"}),
        ("two write one", {"writes different values to one address"}),
        ("all write one", {"writes what writes in another program"}),
        ("read and change", {f"{what} in another program" for what in ATOMICALLY}),
        ("last without a barrier", {"reads what writes in another program"}),
        ("last relaxed", {"reads what writes in another program"}),
        ("read beyond", {"reads outside the tensors that it was given"}),
        ("write beyond", {"writes outside the tensors that it was given"}),
        ("read what is new", {"reads memory that nothing has written"}),
    ],
)
def test_what_is_wrong_is_found(does, finds):
    made = {torch.int32: torch.empty_like, torch.int64: lambda like: like.new_empty(like.shape)}
    if does == "read what is new":
        made |= dict.fromkeys((torch.int8, torch.bfloat16, torch.float32), torch.empty_like)
    for dtype, make in made.items():
        x, out = (torch.zeros(40, dtype=dtype) for _ in "xy")
        with GpuSemantics(0).active() as gpu:
            new = make(x)
            new[0] = 0
            wrong_kernel[(5,)](x, out, new, 8, does)
        # Without the kernel and lines.
        found = {re.sub(r"\S+:\d+( < \S+:\d+)? ", "", finding.split(maxsplit=1)[1]) for finding in gpu.findings}
        assert found == finds
        assert (gpu.launches, gpu.programs) == (1, 5)


@pytest.mark.xfail(strict=True, raises=pytest.fail.Exception, reason="the plugin fails a test with findings")
def test_findings_fail_a_test():
    x = torch.zeros(1, dtype=torch.int32)
    wrong_kernel[(9,)](x, x, x, 8, "all write one")


@triton.jit
def arithmetic_kernel(x, y, out, N: tl.constexpr, DOES: tl.constexpr):
    i = tl.arange(0, N)
    if DOES == "dot":  # of 16 by 64 and 64 by 16 numbers
        row, k = tl.arange(0, 16), tl.arange(0, 64)
        left, right = tl.load(x + row[:, None] * 64 + k), tl.load(y + k[:, None] * 16 + row[None, :])
        tl.store(out + row[:, None] * 16 + row[None, :], tl.dot(left, right))
    else:
        a, b = tl.load(x + i), tl.load(y + i, mask=i < N - 1)
        if DOES == "divide":
            a = a / 3.0
        elif DOES == "exp2":
            a = tl.exp2(a)
        elif DOES == "maximum":
            a = tl.maximum(a, b)
        elif DOES == "product-plus":
            a = a * a + b
        elif DOES == "minus-product":
            a = b - a * a
        tl.store(out + i, a.to(out.dtype.element_ty))


def computed(does: str, x: torch.Tensor, y: torch.Tensor | None = None, dtype=torch.float32, seed: int = 0):
    out = torch.zeros(x.shape, dtype=dtype)
    with GpuSemantics(seed).active():
        arithmetic_kernel[(1,)](x, x if y is None else y, out, len(x), does)
    return out


def test_division_powers_and_matrix_products_are_off_as_far_as_a_gpus_are():
    x = torch.rand(1024) * 6 + 2
    for name, exact in (("divide", x.double() / 3), ("exp2", torch.exp2(x.double()))):
        one, again, other = (computed(name, x, seed=seed) for seed in (1, 1, 2))
        unit = torch.from_numpy(np.spacing(exact.float().numpy())).double()
        assert 1 < ((one.double() - exact).abs() / unit).max() <= ULPS
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
    left, right = torch.rand(16, 64), torch.rand(64, 16)
    exact = left.double() @ right.double()
    for sign in (1, -1):  # cut toward zero
        found = sign * computed("dot", sign * left.flatten(), right.flatten())[:256].view(16, 16).double()
        assert 0 < ((exact - found) / exact).min() < ((exact - found) / exact).max() < 4 * 2.0**-23


LOW, HIGH, NAN, INF = -(2**31), 2**31 - 1, torch.nan, torch.inf
WIDE, ODD = [3e9, -3e9, NAN, -INF, -2.9, 200.7, 40000.0, -200.0], 1 + 2.0**-12  # whose square needs 24 bits more


@pytest.mark.parametrize(
    ("does", "x", "y", "dtype", "expected"),
    [
        ("exp2", [0.0, -0.0, -127.5, -INF], None, torch.float32, [1, 1, 0, 0]),
        ("maximum", [NAN, 2.0, 3.0, 0.0], [1.0, NAN, 4.0, 0.0], torch.float32, [1, 2, 4]),
        ("cast", WIDE, None, torch.int32, [HIGH, LOW, 0, LOW, -2, 200, 40000, -200]),
        ("cast", WIDE, None, torch.int8, [-1, 0, 0, 0, -2, 200 - 256, -1, 256 - 200]),
        ("cast", [1 + 1 / 256, 1 + 3 / 256, -INF, 3.4e38], None, torch.bfloat16, [1, 1 + 4 / 256, -INF, INF]),
        ("product-plus", [ODD] * 4, [-1 - 2.0**-11] * 4, torch.float32, [2.0**-24] * 3),
        ("minus-product", [ODD] * 4, [1 + 2.0**-11] * 4, torch.float32, [-(2.0**-24)] * 3),
    ],
)
def test_numbers_are_those_of_ptx(does, x, y, dtype, expected):
    found = computed(does, torch.tensor(x), None if y is None else torch.tensor(y), dtype)
    assert found[: len(expected)].tolist() == expected
    if does == "product-plus":
        assert found[3].isnan()  # what a mask leaves out is no zero

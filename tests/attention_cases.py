"""Attention problems of every shape, made from a seed or described, and what every way of attending is held to."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from operations import assert_close, device_of, problem_of_case

from nc_patch import KeyIndex
from nc_patch.budget import budget_of
from nc_patch.functional import by_index
from nc_patch.ops.problem import AttentionResult, Problem, causal_intervals, visible_mask
from nc_patch.selections import Block, Selection
from nc_patch.selections.base import selection_class
from nc_patch.selections.block.blocks import BLOCK_SIZES, QUERY_BLOCK_SIZES, SAMPLE_STRIDES

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class Way(NamedTuple):
    """How rows come to their keys: by a selection, and while decoding by an index of a kind."""

    selection: str
    index: str | None = None
    tail: str = "drop"


WAYS = {
    "topk": Way("topk", tail="mean"),
    "drop": Way("topk"),
    "window": Way("window"),
    "dense": Way("dense"),
    "block": Way("block"),
    "codes": Way("topk", "codes"),
    "codes with means": Way("topk", "codes", "mean"),
    "pages": Way("block", "pages"),
}


@dataclass
class Case:
    """Inputs of an operation, and the settings that go with them.

    Attributes:
        options: those of every selection, by name.
        law: the arguments of ``sparse_attention`` from which the budget follows, where it does.
        exact: float32 holds every score, so that ties are ties in every arithmetic.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor
    origin: torch.Tensor
    budget: torch.Tensor
    sinks: torch.Tensor | None
    scale: float
    softcap: float
    options: dict[str, Any]
    law: dict[str, Any] = field(default_factory=dict)
    exact: bool = False

    @property
    def rows(self) -> torch.Tensor:
        """How many keys each query sees, int32 ``[B, 1, Lq]``."""
        return (self.visible[..., 1] - self.visible[..., 0])[:, None]

    def selection(self, way: str) -> Selection:
        """The selection of a way, with the case's options."""
        kind = selection_class(WAYS[way].selection)
        given = self.options | {"tail": WAYS[way].tail}
        return kind(**{name: given[name] for name in kind.options if name in given})

    def reference(self, way: str) -> AttentionResult:
        """What the float64 definition makes of the case."""
        return self.selection(way).reference(problem_of_case(self), WAYS[way].index == "pages")

    def unread(self, way: str) -> torch.Tensor:
        """Positions that nothing may be read from, bool ``[B, 1, Lk, 1]``: what no query sees.

        Pages are those of a sequence: there what lies outside of all sequences.
        """
        visible = self.visible
        if WAYS[way].tail == "mean" or WAYS[way].index == "pages":
            visible = torch.stack((self.origin.amin(1), visible[..., 1].amax(1)), -1)[:, None]
        return ~visible_mask(visible, self.key.shape[2]).any(2)[:, 0, None, :, None]

    def problem(self, way: str, backend: str = "torch", new: int = 0, **more: Any) -> Problem:
        """The problem of a way, with NaN where nothing may be read; its index has yet to take in ``new`` keys."""
        problem = problem_of_case(self, device_of(backend), **more)
        unread = self.unread(way).to(problem.key.device)
        nan = {name: getattr(problem, name).masked_fill(unread, torch.nan) for name in ("key", "value")}
        problem, kind = problem._replace(**nan), WAYS[way].index
        if kind is None:
            return problem
        index = index_of(problem, kind, backend, new, self.options["size"])
        for b, end in enumerate(problem.visible[..., 1].amax(1).tolist()):
            for part in index.tensors()[:3] if kind == "codes" else ():  # those of the new keys may be anything yet
                part[b, :, end - new :] = 77
        return by_index(problem, index, max(int(self.budget.max()), 1) if self.budget.numel() else 1)._replace(new=new)

    def run(self, way: str, backend: str, **more: Any) -> AttentionResult:
        """What a backend makes of the case, on the CPU; ``more`` as for ``problem``."""
        result = self.selection(way).run(self.problem(way, backend, **more), backend)
        return AttentionResult(*(t if t is None else t.cpu() for t in result))


def index_of(problem: Problem, kind: str, backend: str, new: int = 0, block_size: int = 16) -> KeyIndex:
    """An index of what the rows of a problem see, which has yet to take in the last ``new`` keys."""
    start = problem.visible[:, -1, 0] if kind == "codes" else problem.origin[:, -1]
    end, capacity = problem.visible[..., 1].amax(1) - new, problem.key.shape[2] + 64
    options = {"block_size": block_size, "capacity": capacity, "backend": backend}
    return KeyIndex.build(problem.key, kind, value=problem.value, start=start, end=end, **options)


def check(
    way: str, case: Case, backend: str = "torch", expected: AttentionResult | None = None, new: int = 0,
    tolerance: float | None = None, stats: bool = True, bounds: bool = False,
) -> AttentionResult:  # fmt: skip
    """Fails unless a backend gives the reference's numbers; returns what it gives, on the CPU.

    Held to it are the output, the number of attended keys, and with ``stats`` the log-sum-exp and the kept mass (the
    bounds of it, with ``bounds``).
    """
    expected = case.reference(way) if expected is None else expected
    result = case.run(way, backend, new=new, stats=stats, bounds=bounds)
    dtype = case.query.dtype
    assert result.output.dtype == dtype
    assert_close(result.output, expected.output, TOLERANCE[dtype] if tolerance is None else tolerance)
    by_codes = WAYS[way].index == "codes"
    if stats:
        means_rounded = WAYS[way].tail == "mean" and dtype != torch.float32
        assert_near(result.lse, expected.lse, *((1e-2, 1e-2) if means_rounded else (1e-5, 1e-4)))
        if not by_codes:
            assert_near(result.kept_mass, expected.kept_mass, 1e-5, 1e-5)
    else:
        assert result.kept_mass is None
    if result.attended is not None:
        assert torch.equal(result.attended, expected.attended)
    assert (result.kept_mass_bounds is not None) == bounds
    if bounds:
        (low, high), kept = result.kept_mass_bounds.double().unbind(-1), expected.kept_mass
        assert bool(((result.kept_mass_bounds >= 0) & (result.kept_mass_bounds <= 1)).all())
        assert bool(((low <= kept) & (kept <= high) | kept.isnan()).all())
    return result


def assert_near(actual: torch.Tensor | None, expected: torch.Tensor, relative: float, absolute: float) -> None:
    """Both the norm of the difference and its largest element are bounded."""
    assert actual is not None
    assert_close(actual, expected, relative)
    torch.testing.assert_close(actual.double(), expected, atol=absolute, rtol=1e-5, equal_nan=True)


HEAD_DIMS = (64, 80, 96, 128, 192, 256)
LAYOUTS = ("contiguous", "transposed", "rows apart", "expanded 0", "expanded 1", "expanded 2")
# What the Triton kernels refuse by name: columns that do not lie side by side.
COLUMN_LAYOUTS = ("columns apart", "columns first", "expanded 3")


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, or for an expanded layout some of them repeated, as a view of another layout.

    What lies around the view in memory is NaN, so that reading beyond it shows.
    """
    B, H, L, D = tensor.shape
    if layout in ("transposed", "columns first"):
        axes = (1, 2) if layout == "transposed" else (2, 3)
        return tensor.transpose(*axes).contiguous().transpose(*axes)
    if layout == "contiguous" or not tensor.numel():
        return tensor
    if layout.startswith("expanded"):
        return tensor.narrow(int(layout[-1]), 0, 1).expand(tensor.shape)
    columns, rows = 2 if layout == "columns apart" else 1, 3 if layout == "rows apart" else 1
    around = torch.full((B + 1, H + 1, rows * L + 2, columns * D + 3), torch.nan, dtype=tensor.dtype)
    view = around[1:, 1:, 1 : 1 + rows * L : rows, 2 : 2 + columns * D : columns]
    view.copy_(tensor)
    return view


def every(step: int, key: torch.Tensor) -> torch.Tensor:
    """Which keys are every ``step``-th."""
    return torch.arange(key.shape[2])[:, None] % step == 0


# Keys on which bounds are easily wrong. Their scores are exact in float32, so that ties are ties in every arithmetic.
HARD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as they are": lambda key: key,
    "all equal": lambda key: key[:, :, :1].round().expand(key.shape).clone(),
    "one outlier a page": lambda key: torch.where(every(16, key), key * 64, key),
    "huge norms": lambda key: torch.where(every(7, key), key * 2.0**60, key),
    "denormals": lambda key: key * 2.0**-130,
    "far from zero": lambda key: key.round() + torch.arange(key.shape[-1]) * 4.0,
    "heavy tails": lambda key: key.pow(5).round(),
    "clustered": lambda key: key * 0.125 + key[:, :, :1].round() * (torch.arange(key.shape[2]) % 3)[:, None],
}
NEGATIVE_NAN = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
# Keys along one axis, where no order of summation changes which score is larger.
SPOILED = {name: HARD[name] for name in ("all equal", "one outlier a page", "huge norms", "denormals")} | {
    "signed zeros": lambda key: torch.where(every(2, key), -0.0, key * 0),
    "far apart": lambda key: key * torch.logspace(-30, 16, key.shape[2])[:, None],
    "infinite": lambda key: key.index_fill(2, torch.tensor([11, 30]), torch.inf).index_fill(
        2, torch.tensor(12), -torch.inf
    ),
    # Beside the lowest that are attended the differences between the highest are lost in float32.
    "most far below": lambda key: torch.where(every(4, key), key, -1e20 * (1 + key.abs())),
    "nan": lambda key: key.index_fill(2, torch.tensor(11), torch.nan).index_fill(2, torch.tensor(40), NEGATIVE_NAN),
    "pages alike": lambda key: (torch.arange(key.shape[2]) // 16 % 3)[:, None] * 0.25 + key * 0,
}
# Page weights of the others lie further apart than float32 can hold, or logits closer than its rounding.
PAGE_KINDS = [HARD[name] for name in ("all equal", "huge norms", "denormals", "heavy tails", "clustered")]


@dataclass(frozen=True)
class Shape:
    """A described input: its sizes, what its queries may see, its settings, and the ways that it is attended by.

    Attributes:
        intervals: ``"causal"``, ``"padding"`` on the left, ``"packed"`` sequences, a ``"sliding"`` window, the keys of
            a ``"cache"`` that has dropped the first of its sequences, the beginning of a ``"static"`` cache, ``"both"``
            directions, ``"ragged"`` rows of which some are empty, ``"any"`` such rows of one sequence, ``"empty"``
            ones, some in padded sequences (``"holes"``), rows ``"apart"``, with keys between them that none sees, or
            where causal sequences end, ``("ends", ...)``. Places may follow others' names too: where sequences begin,
            the window and how much is dropped, the keys that are seen both ways, how much is dropped before any.
        budget: of a row with n keys: so many, ``"law"``, ``"full"``, ``"any"`` number, or any number ``"per_head"``.
        dense_below: rows that see no more keys attend all of them.
        sinks: drawn, or all of one number. unequal: how unlike in size keys are, so that blocks differ in mass.
        tied: scores lie on a small grid and most tie, and the values of different keys are orthogonal. spoiled: which
            of ``SPOILED`` the keys are.
        layout: how tensors lie in memory, see ``laid_out``.
        blocks: the options of ``block``.
    """

    name: str
    ways: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    batch: int = 1
    kv_heads: int = 1
    group: int = 2
    queries: int = 20
    keys: int = 53
    head_dim: int = 64
    value_dim: int | None = None
    intervals: str | tuple[Any, ...] = "causal"
    budget: int | str = "law"
    dense_below: int = 0
    softcap: float = 0.0
    sinks: bool | float = False
    sink_keys: int = 4
    recent_keys: int = 1
    unequal: float = 3.0
    tied: bool = False
    spoiled: str | None = None
    layout: str = "contiguous"
    blocks: dict[str, Any] = field(default_factory=dict)

    def case(self, seed: int = 0) -> Case:
        """Random inputs of this shape, on the CPU."""
        g = torch.Generator().manual_seed(seed)
        heads, normal = self.kv_heads * self.group, lambda *shape: torch.randn(shape, generator=g)
        query, key, value = (
            normal(self.batch, count, length, width)
            for count, length, width in (
                (heads, self.queries, self.head_dim),
                (self.kv_heads, self.keys, self.head_dim),
                (self.kv_heads, self.keys, self.value_dim or self.head_dim),
            )
        )
        key = key * (1 + self.unequal * torch.rand(self.batch, self.kv_heads, self.keys, 1, generator=g) ** 4)
        if self.tied:
            for tensor in (query, key):
                tensor.zero_()[..., :3] = torch.randint(-1, 2, (*tensor.shape[:3], 3), generator=g)
            value = torch.eye(self.keys).expand(*key.shape[:2], -1, -1)
        if self.spoiled is not None:
            query.zero_()[..., 0] = 1.5
            key = SPOILED[self.spoiled](key)
            key[..., 1:] = 0.0
        tensors = [laid_out(t.to(self.dtype).contiguous(), self.layout) for t in (query, key, value)]
        visible, origin = self.intervals_of(g)
        n = (visible[..., 1] - visible[..., 0])[:, None]
        if isinstance(self.budget, int):
            budget = n.clamp(max=self.budget)
        elif self.budget in ("full", "law"):
            budget = n if self.budget == "full" else (1 + (1.5 * n.double() ** 0.6).int()).minimum(n)
        else:
            share = torch.rand(self.batch, heads if self.budget == "per_head" else 1, self.queries, generator=g)
            budget = (share * (n + 1)).int().clamp(min=1).minimum(n)
        budget = torch.where(n <= self.dense_below, n, budget).contiguous()
        sinks = normal(heads) if self.sinks is True else torch.full((heads,), self.sinks) if self.sinks else None
        options = {"size": 16, "sample_stride": 16, "local_keys": 0}
        options |= {"sink_keys": self.sink_keys, "recent_keys": self.recent_keys, **self.blocks}
        return Case(*tensors, visible, origin, budget, sinks, self.head_dim**-0.5, self.softcap, options)

    def intervals_of(self, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """``visible`` and ``origin``."""
        kind, *at = (self.intervals,) if isinstance(self.intervals, str) else self.intervals
        B, keys = self.batch, self.keys
        visible = causal_intervals(B, self.queries, keys, "cpu").clone()
        origin = torch.zeros_like(visible[..., 0])
        if kind == "ends":
            visible[..., 1] += torch.tensor(at, dtype=torch.int32)[:, None] - keys
        elif kind in ("padding", "holes"):
            origin += torch.tensor(at or [13 * b for b in range(B)], dtype=torch.int32)[:, None]
        elif kind == "packed":
            for border in at or (keys // 8, keys // 4, keys * 3 // 4):
                origin[visible[..., 1] > border] = border
        elif kind in ("sliding", "cache"):
            window, dropped = at or ((keys * 2 // 5, 0) if kind == "sliding" else (keys * 4 // 5, 21))
            visible[..., 0], origin = visible[..., 1] - window, origin - dropped
        elif kind == "static":
            visible[..., 1] -= 41
        elif kind == "both":
            visible[...] = torch.tensor(at or (5, keys - 2))
        elif kind == "apart":
            for first, interval in ((0, (2, 9)), (5, (12, 26)), (9, (40, 40)), (11, (45, 50)), (15, (26, 33))):
                visible[:, first:] = torch.tensor(interval)
        elif kind in ("ragged", "any", "empty"):
            visible = torch.randint(0, keys + 1, visible.shape, generator=g).sort(-1).values.to(torch.int32)
            empty = slice(None) if kind == "empty" else slice(4, None, 5)
            visible[:, empty, 1] = visible[:, empty, 0]
            if kind == "ragged":
                origin = visible[..., 0].clone()
            elif kind == "any":
                origin = origin - at[0] if at else origin + visible[..., 0].amin(1, keepdim=True)
        visible[..., 0] = torch.maximum(visible[..., 0], origin.clamp(min=0))
        visible[..., 1] = torch.maximum(visible[..., 1], visible[..., 0])
        if kind == "holes":
            visible[1, 0], visible[0, 1] = 25, 0
        return visible, origin


def shape(name: str, *ways: str, **given: Any) -> Shape:
    """The shape with these fields and options of ``block``, by which it is attended where no way is named."""
    blocks = {option: given.pop(option) for option in Block.options if option in given}
    return Shape(name, ways or ("block",), blocks=blocks, **given)


in_blocks = partial(shape, queries=150, keys=150, head_dim=32, budget=40)
decoded = partial(shape, queries=1, keys=130, recent_keys=2, group=3)
ROWS, ALL = ("drop", "window"), ("topk", "drop", "window", "block")
KEPT, INDEXED = ("codes", "pages"), ("codes", "codes with means", "pages")
BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = [
    Shape("plain", (*ALL, "dense")),
    Shape("bf16-d80-g3-transposed", ALL, BF16, 1, 2, 3, 7, head_dim=80, layout="transposed"),
    Shape("fp16-d96-g5", ("drop",), FP16, group=5, head_dim=96, queries=7, sink_keys=0, recent_keys=0),
    Shape("bf16-d128-g7-left-padding", ROWS, BF16, 2, 1, 7, 9, head_dim=128, intervals="padding"),
    Shape("d192-narrow-values", ("drop", "block"), group=1, queries=23, head_dim=192, value_dim=128),
    Shape("bf16-d256", (*ROWS, "block"), BF16, queries=16, keys=40, head_dim=256, softcap=5.0, sinks=True),
    Shape("softcap-per-head-budgets", ALL, kv_heads=2, group=3, queries=10, softcap=2.0, budget="per_head", sinks=True),
    Shape("packed", ALL, group=1, queries=73, keys=73, intervals="packed", sink_keys=2, recent_keys=3),
    Shape("sliding", ALL, BF16, group=1, queries=31, keys=90, intervals="sliding"),
    Shape("cache", ("topk", "block"), queries=27, keys=75, intervals="cache"),
    Shape("ragged", (*ROWS, "block"), batch=2, group=1, intervals="ragged", budget="any"),
    Shape("both-directions", (*ROWS, "block"), group=1, queries=40, keys=70, intervals="both"),
    Shape("one-query", ("drop",), BF16, 2, 2, 4, 1, 97),
    Shape("one-key", (*ALL, *KEPT), group=1, queries=1, keys=1),
    Shape("full-budget", ALL, queries=17, keys=33, budget="full", sinks=True),
    Shape("forced-keys-fill-the-budget", ROWS, sink_keys=30, recent_keys=40, budget="any"),
    Shape("empty", (*ALL, *KEPT), queries=3, intervals="empty", sinks=True),
    Shape("no-query", ("drop", "block"), queries=0, sinks=True),
    Shape("sinks-beyond-all-scores", tuple(WAYS), queries=5, sinks=120.0),
    Shape("apart", (*ROWS, "block"), group=1, intervals="apart"),
    Shape("ties", ("topk", "drop"), BF16, 1, 2, 1, 30, budget="any", sink_keys=2, recent_keys=2, tied=True),
    *(Shape(f"keys-{kind}".replace(" ", "-"), ("drop",), group=1, unequal=0.0, spoiled=kind) for kind in SPOILED),
    *(
        Shape(f"keys-{kind}-softcap", ROWS, softcap=3.0, spoiled=kind, sink_keys=0, recent_keys=0)
        for kind in ("infinite", "nan", "most far below")
    ),
    # Blocks: of other sizes, chosen by other rows, with rows that attend all.
    in_blocks("b32-g3", size=32, dtype=FP16, group=3, head_dim=96, queries=70, keys=101),
    in_blocks("b64-q128", size=64, query_block_size=128, dtype=BF16, queries=50, keys=190),
    in_blocks("b128", size=128, dtype=BF16, queries=100, keys=300, budget=130, softcap=3.0),
    in_blocks("blocks-left-padding", batch=2, intervals="padding", queries=90, keys=110),
    in_blocks("stride-1", sample_stride=1, query_block_size=32, queries=70, keys=130),
    in_blocks("stride-by-the-law", sample_stride=None, local_keys=16, kv_heads=2, group=1),
    in_blocks("local-keys", sample_stride=None, local_keys=64, queries=110, keys=230, budget=170),
    in_blocks("local-keys-beyond-the-budget", local_keys=100, queries=60, keys=230, budget=70),
    in_blocks("dense-rows", sample_stride=None, local_keys=64, budget=20, dense_below=100),
    in_blocks("packed-dense-rows", sample_stride=None, local_keys=16, intervals="packed", budget=20, dense_below=40),
    in_blocks("local-keys-nan", local_keys=64, queries=110, keys=230, budget=130, spoiled="nan"),
    in_blocks("packed-blocks", intervals="packed", budget=20),
    in_blocks("sliding-blocks", intervals="sliding", queries=140, keys=170, group=1, budget=50),
    in_blocks("min-mass", min_mass=0.9, max_factor=8.0, queries=90, keys=260, budget=33),
    in_blocks("min-mass-capped", min_mass=0.99, max_factor=1.5, keys=300, budget=80),
    in_blocks("min-mass-sliding", min_mass=0.97, max_factor=8.0, keys=300, intervals="sliding", budget=16),
    in_blocks("rows-that-attend-none", intervals="any", budget=1, queries=88, keys=88),
    in_blocks("equal-blocks", group=1, queries=20, keys=260, budget=80, spoiled="all equal"),
    in_blocks("nan-block", group=1, intervals="packed", budget="full", spoiled="nan"),
    in_blocks("infinite-block", group=1, intervals="packed", budget="full", spoiled="infinite"),
    # Decoding: few queries, of sequences with one origin each.
    decoded("decode", *INDEXED),
    decoded(
        "bf16-d80-g7-left-padding", *INDEXED, dtype=BF16, batch=2, group=7, head_dim=80, queries=2, intervals="padding"
    ),
    decoded("decode-fp16-d96-g1", *KEPT, dtype=FP16, group=1, head_dim=96, queries=5),
    decoded("decode-d128-sinks", *KEPT, head_dim=128, sinks=True, softcap=3.0, queries=2),
    decoded("sixteen-queries", *KEPT, queries=16, group=2, budget="per_head", keys=60),
    decoded("decode-d192", *KEPT, head_dim=192, value_dim=40, group=1),
    decoded("decode-bf16-d256", "codes", dtype=BF16, head_dim=256, softcap=5.0, keys=70),
    decoded("decode-ragged", "codes", batch=2, queries=5, intervals="ragged", budget="any"),
    decoded("decode-holes", *KEPT, batch=2, queries=3, keys=60, intervals="holes", sinks=True),
    decoded("decode-sliding", *INDEXED, queries=5, intervals="sliding"),
    decoded("decode-cache", "pages", queries=2, intervals="cache"),
    decoded("decode-static", *KEPT, intervals="static", batch=2),
    decoded("decode-full-budget", *KEPT, budget="full", keys=77),
    decoded("decode-forced-keys", "codes", sink_keys=40, recent_keys=50, budget="any", queries=3),
    decoded("budget-of-one", *KEPT, budget=1),
    decoded("decode-columns-first", *KEPT, queries=2, layout="columns first"),
    decoded("wide-group", "pages", group=19, budget=40),
    decoded("decode-ties", "codes", queries=6, group=2, kv_heads=2, budget="per_head", tied=True),
    decoded("pages-alike", "pages", queries=2, keys=256, budget=112, spoiled="pages alike"),
    decoded("equal-pages", "pages", queries=2, keys=256, budget=112, spoiled="all equal"),
    decoded("nan-pages", "pages", group=1, queries=3, unequal=0.0, spoiled="nan"),
    *(decoded(f"decode-{kind}", "codes", group=1, queries=3, unequal=0.0, spoiled=kind) for kind in [*SPOILED][:-1]),
    decoded("p32", "pages", keys=331, size=32, budget=90),
    decoded("p64-transposed", "pages", keys=350, size=64, budget=130, layout="transposed"),
]
DESCRIBED = {f"{shape.name}-{way}": (shape, way) for shape in SHAPES for way in shape.ways}


def random_case(
    seed: object, longest: int = 150, dtype: torch.dtype | None = torch.float32, decode: bool = False, *,
    queries: int = 1000, odd: bool = False, broken: bool = False, layouts: tuple[str, ...] = LAYOUTS[:1],
) -> Case:  # fmt: skip
    """A case in which everything may vary: lengths, heads, intervals, laws, ties, soft-cap, sinks, block options.

    Every interval lies within its sequence.

    Args:
        longest, queries: at most so many keys and queries. dtype: any where it is None.
        decode: each sequence has few queries, and is the only one of its row of the batch.
        odd: sizes of none, large head dimensions and scores, and settings without measure are drawn too.
        broken: with NaN and infinities in places. layouts: how tensors may lie in memory.
    """
    rng = random.Random(f"case {seed}")
    pick = lambda plain, *other: rng.choice((*plain, *other) if odd else plain)  # noqa: E731
    dtype = dtype or rng.choice((torch.float32, torch.bfloat16, torch.float16))
    B = pick((1, 1, 2) if broken else (1, 1, 1, 2, 2, 3), *(0,) * (not broken))
    Hkv, group = rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3, 4, 5, 7, 8))
    D = pick([rng.randint(1, 40) for _ in range(14)], *HEAD_DIMS)
    Lk = min(longest, pick((1, 2, 15, 16, 17, 63, 64, 65, *(rng.randint(1, longest) for _ in range(20))), 0))
    kinds = ("causal", "causal", "padding", "sliding", "any", "any", "empty", "both")
    kind = rng.choice(kinds if decode else (*kinds, "packed"))
    Lq = pick((1, Lk, *(rng.randint(1, max(1, Lk)) for _ in range(2))), *(0,) * (not decode))
    if kind in ("any", "empty", "both"):
        Lq = rng.choice((Lq, rng.randint(1, 40)))
    Lq = min(max(Lq, 1), 32 if odd else 5, queries) if decode else min(Lq, queries)
    places: dict[str, Sequence[int]] = {
        "padding": [rng.randint(0, Lk) for _ in range(B)],
        "sliding": (rng.randint(1, 60), 0 if decode else rng.choice((0, 0, rng.randint(0, 70)))),
        "packed": sorted(rng.randrange(max(Lk, 1)) for _ in range(2)),
        "both": (0, Lk),
        "any": () if decode else (rng.choice((0, rng.randint(0, 40))),),
    }
    shape = Shape(
        "random", (), dtype, B, Hkv, group, Lq, Lk, D, rng.choice((D, D, rng.randint(1, 24))),
        intervals=(kind, *places.get(kind, ())), unequal=0.0, budget=1, sinks=rng.random() < 0.3,
        softcap=0.0 if broken else pick((0.0, 0.0, 3.0), 50.0),
        sink_keys=pick((4, 0, rng.randint(0, 5)), rng.randint(0, 20), 10**6),
        recent_keys=pick((1, 0, rng.randint(0, 5)), 10**6),
        blocks={
            "size": pick((16, 32), *BLOCK_SIZES),
            "query_block_size": rng.choice(QUERY_BLOCK_SIZES),
            "sample_stride": rng.choice((None, None, *SAMPLE_STRIDES)),
            "local_keys": pick((0, 0, 64, rng.randint(0, 260)), 10**6),
            "min_mass": pick((None,), None, 0.5, 0.9),
            "max_factor": pick((4.0,), 1.0, 1e300),
        },
    )  # fmt: skip
    case = shape.case(rng.randrange(2**31))
    case.exact = rng.random() < 0.5
    for name in ("query", "key", "value"):
        tensor, layout = getattr(case, name), rng.choice(layouts)
        if case.exact:
            tensor = (2 * tensor).round().clamp(-7, 7) / 2
        for _ in range(rng.randint(0, 3) if broken and tensor.numel() else 0):
            tensor[tuple(rng.randrange(size) for size in tensor.shape)] = rng.choice((torch.nan, torch.inf, -torch.inf))
        # Equal keys tie, and with free values rounding would decide which of them come first.
        setattr(case, name, tensor if layout == "expanded 2" and not case.exact else laid_out(tensor, layout))
    if case.sinks is not None:
        case.sinks = case.sinks.to(rng.choice((torch.float32, dtype))).repeat_interleave(2)[::2]
    # Among broken values scores stay so small that no weight vanishes in float32.
    case.scale = rng.choice((D**-0.5, 0.02)) if broken else pick((D**-0.5, D**-0.5, 0.125), 0.3, 1.0)
    factor = lambda: pick((1.0, 2.0, 4.0, rng.uniform(0.1, 9.0)), 0.1, 1e-30, 1e30)  # noqa: E731
    exponent = lambda: pick((0.0, 0.5, rng.random()), 1.0)  # noqa: E731
    laws = [(factor(), exponent()) for _ in range(Hkv * group if rng.random() < 0.3 else 1)]
    limits = {"min_keys": pick((1, 1, 1, rng.randint(1, 40)), 10**9)}
    limits["dense_below"] = pick((0, 0, 0, rng.randint(0, 260)), 10**6)
    budget = [[[budget_of(n, *law, **limits) for n in rows] for law in laws] for [rows] in case.rows.tolist()]
    case.budget = torch.tensor(budget, dtype=torch.int32).view(B, len(laws), Lq)
    alpha, C = (list(each) if len(laws) > 1 else each[0] for each in zip(*laws, strict=True))
    case.law = {"alpha": alpha, "C": C, **limits}
    return case

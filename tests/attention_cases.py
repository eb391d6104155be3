"""Attention problems of every shape, made from a seed or described, and what every way of attending is held to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from operations import assert_close, problem_of_case, selection_of

from nc_patch import KeyIndex
from nc_patch.functional import by_index
from nc_patch.ops.problem import AttentionResult, Problem, causal_intervals, visible_mask
from nc_patch.ops.reference import final_scores, raw_scores
from nc_patch.selections import Selection

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
BLOCK_OPTIONS = ("block_size", "query_block_size", "sample_stride", "local_keys", "min_mass", "max_factor")


@dataclass
class Case:
    """Inputs of an operation, and the settings that go with them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor
    origin: torch.Tensor
    budget: torch.Tensor
    sinks: torch.Tensor | None
    scale: float
    softcap: float
    sink_keys: int
    recent_keys: int
    block_size: int = 16
    query_block_size: int = 64
    sample_stride: int | None = 16
    local_keys: int = 0
    min_mass: float | None = None
    max_factor: float = 4.0

    @property
    def rows(self) -> torch.Tensor:
        """How many keys each query sees, int32 ``[B, 1, Lq]``."""
        return (self.visible[..., 1] - self.visible[..., 0])[:, None]

    def selection(self, way: str, **options: Any) -> Selection:
        """The selection of a way, with the case's options or others."""
        given = {name: getattr(self, name) for name in ("sink_keys", "recent_keys", *BLOCK_OPTIONS)}
        return selection_of(WAYS[way].selection, tail=WAYS[way].tail == "mean", **given | options)

    def reference(self, way: str) -> AttentionResult:
        """What the float64 definition makes of the case."""
        return self.selection(way).reference(problem_of_case(self), WAYS[way].index == "pages")

    def scores(self) -> torch.Tensor:
        """q·k in float64, ``[B, Hq, Lq, Lk]``, scaled and soft-capped."""
        problem = problem_of_case(self)
        return final_scores(problem, raw_scores(problem))

    def unread(self, way: str) -> torch.Tensor:
        """Positions that nothing may be read from, bool ``[B, 1, Lk, 1]``: what no query sees.

        Pages are those of a sequence: there what lies outside of all sequences.
        """
        visible = self.visible
        if WAYS[way].tail == "mean" or WAYS[way].index == "pages":
            visible = torch.stack((self.origin.amin(1), visible[..., 1].amax(1)), -1)[:, None]
        return ~visible_mask(visible, self.key.shape[2]).any(2)[:, 0, None, :, None]

    def problem(self, way: str, backend: str = "torch", device: str = "cpu", new: int = 0, **more: Any) -> Problem:
        """The problem of a way, with NaN where nothing may be read; its index has yet to take in ``new`` keys."""
        problem = problem_of_case(self, device, **more)
        unread = self.unread(way).to(device)
        nan = {name: getattr(problem, name).masked_fill(unread, torch.nan) for name in ("key", "value")}
        problem, kind = problem._replace(**nan), WAYS[way].index
        if kind is None:
            return problem
        end = problem.visible[..., 1].amax(1)
        start = problem.origin[:, -1] if kind == "pages" else problem.visible[:, -1, 0]
        index = KeyIndex.build(
            problem.key, kind, start=start, end=end - new, block_size=self.block_size, backend=backend,
            capacity=self.key.shape[2] + 64,
        )  # fmt: skip
        for b, last in enumerate(end.tolist()):
            for part in index.tensors()[:3] if kind == "codes" else ():  # the new keys have no codes yet
                part[b, :, last - new :] = 0
        return by_index(problem, index, max(int(self.budget.max()), 1) if self.budget.numel() else 1)._replace(new=new)


def check(
    way: str, case: Case, backend: str = "torch", device: str = "cpu", expected: AttentionResult | None = None,
    new: int = 0, tolerance: float | None = None, stats: bool = True, bounds: bool = False,
) -> AttentionResult:  # fmt: skip
    """Fails unless a backend gives the reference's numbers; returns what it gives, on the CPU.

    Held to it are the output, the number of attended keys, and with ``stats`` the log-sum-exp and the kept mass (the
    bounds of it, with ``bounds``).
    """
    expected = case.reference(way) if expected is None else expected
    problem = case.problem(way, backend, device, new, stats=stats, bounds=bounds)
    result = AttentionResult(*(t if t is None else t.cpu() for t in case.selection(way).run(problem, backend)))
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
        assert_contains(result.kept_mass_bounds, expected.kept_mass)
    return result


def assert_near(actual: torch.Tensor | None, expected: torch.Tensor, relative: float, absolute: float) -> None:
    """Both the norm of the difference and its largest element are bounded."""
    assert actual is not None
    assert_close(actual, expected, relative)
    torch.testing.assert_close(actual.double(), expected, atol=absolute, rtol=1e-5, equal_nan=True)


def assert_contains(bounds: torch.Tensor, kept_mass: torch.Tensor) -> None:
    """Bounds ``[..., 2]`` within 0 and 1 hold the kept mass, wherever that is a number."""
    assert not bounds.isnan().any()
    assert bounds.min() >= 0
    assert bounds.max() <= 1
    known = ~kept_mass.isnan()
    assert (bounds[..., 0].double() <= kept_mass)[known].all()
    assert (bounds[..., 1].double() >= kept_mass)[known].all()


def random_case(seed: int, longest: int = 150, dtype: torch.dtype = torch.float32, decode: bool = False) -> Case:
    """A case in which everything may vary: lengths, heads, intervals, budgets, ties, soft-cap, sinks, block options.

    Every interval lies within its sequence. In some cases rows that see few keys have a budget of all of them. With
    ``decode`` a sequence has at most five queries, and is the only one of its row of the batch.
    """
    g = torch.Generator().manual_seed(seed)
    pick = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=g))  # noqa: E731
    B, Hkv, group, D, Dv = pick(1, 3), pick(1, 3), pick(1, 5), pick(1, 20), pick(1, 20)
    Lk = pick(1, longest)
    Lq = pick(1, min(Lk, 5) if decode else Lk)
    Hq = Hkv * group
    query, key, value = (
        torch.randn(B, heads, length, width, generator=g)
        for heads, length, width in ((Hq, Lq, D), (Hkv, Lk, D), (Hkv, Lk, Dv))
    )
    if pick(0, 2) == 0:  # scores on a grid: many ties, and none of them by rounding
        query, key = query.round(), key.round()
    query, key, value = (t.to(dtype) for t in (query, key, value))

    visible = causal_intervals(B, Lq, Lk, "cpu").clone()
    origin = torch.zeros(B, Lq, dtype=torch.int32)
    kind = pick(0, 3 if decode else 4)
    if kind == 1:  # left padding
        origin += torch.randint(0, Lk + 1, (B, 1), generator=g, dtype=torch.int32)
        visible[..., 0] = torch.minimum(origin, visible[..., 1])
    elif kind == 2:  # sliding window
        visible[..., 0] = (visible[..., 1] - pick(1, 60)).clamp(min=0)
    elif kind == 3:  # any interval, empty ones too
        visible = torch.randint(0, Lk + 1, (B, Lq, 2), generator=g).sort(-1).values.to(torch.int32)
        origin += visible[..., 0].amin(1, keepdim=True)
    elif kind == 4:  # packed sequences
        borders = torch.randint(0, Lk, (4,), generator=g, dtype=torch.int32).sort().values
        borders[0] = 0
        origin = borders[torch.searchsorted(borders, visible[..., 1].contiguous() - 1, right=True) - 1]
        visible[..., 0] = origin
    n = (visible[..., 1] - visible[..., 0])[:, None]
    share = torch.rand(B, Hq if pick(0, 3) == 0 else 1, Lq, generator=g)
    budget = (share * share * (n + 1)).floor().clamp(min=1).minimum(n).to(torch.int32)
    if pick(0, 2) == 0:
        budget = torch.where(n <= pick(1, longest), n, budget)
    sinks = torch.randn(Hq, generator=g) if pick(0, 2) == 0 else None
    scale, softcap = (0.125, 0.3)[pick(0, 1)], (0.0, 3.0)[pick(0, 1)]
    return Case(
        *(query, key, value, visible, origin, budget, sinks, scale, softcap, pick(0, 5), pick(0, 5)),
        block_size=(16, 32)[pick(0, 1)],
        query_block_size=(32, 64, 64, 128)[pick(0, 3)],
        sample_stride=(None, None, 1, 4, 16, 64)[pick(0, 5)],
        local_keys=(0, 16, 64, 100)[pick(0, 3)],
    )


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
KINDS = [*HARD.values()]
# Page weights of the others lie further apart than float32 can hold, or logits closer than its rounding.
PAGE_KINDS = [HARD[name] for name in ("all equal", "huge norms", "denormals", "heavy tails", "clustered")]


def peaked(seed: int, B: int, n: int, Hq: int = 4, Hkv: int = 2, D: int = 16) -> tuple[torch.Tensor, ...]:
    """Query, key and value whose attention is sparse: keys drift slowly, and some queries repeat an early key."""
    g = torch.Generator().manual_seed(seed)
    drift = torch.randn(B, Hkv, n, D, generator=g).cumsum(2)
    key = drift / drift.norm(dim=-1, keepdim=True) * 4 + torch.randn(B, Hkv, n, D, generator=g) * 0.3
    query = key.repeat_interleave(Hq // Hkv, 1) + torch.randn(B, Hq, n, D, generator=g)
    query[:, :, n // 2 :: 3] = query[:, :, : n - n // 2 : 3]
    return query, key, torch.randn(B, Hkv, n, D, generator=g)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """‖result − expected‖ / ‖expected‖ in float64; NaN where either is."""
    result, expected = result.double(), expected.double()
    return float((result - expected).norm() / expected.norm().clamp(min=1e-30))


@dataclass(frozen=True)
class Shape:
    """A described input: its sizes, what its queries may see, its settings, and the ways that it is attended by.

    Attributes:
        intervals: ``"causal"``, ``"padding"`` on the left, ``"packed"`` sequences, a ``"sliding"`` window, the keys of
            a ``"cache"`` that has dropped the first of its sequences, the beginning of a ``"static"`` cache, ``"both"``
            directions, ``"ragged"`` rows of which some are empty, or ``"empty"`` ones.
        budget: of a row with n keys: so many, ``"law"``, ``"full"``, ``"any"`` number, or any number ``"per_head"``.
        dense_below: rows that see no more keys attend all of them.
        unequal: how unlike in size keys are, so that blocks differ in mass.
        transposed: whether tensors lie in memory by position before head, as projections leave them.
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
    intervals: str = "causal"
    budget: int | str = "law"
    dense_below: int = 0
    softcap: float = 0.0
    sinks: bool = False
    sink_keys: int = 4
    recent_keys: int = 1
    unequal: float = 3.0
    transposed: bool = False
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
        tensors = [t.to(self.dtype) for t in (query, key, value)]
        if self.transposed:
            tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
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
        sinks, keys = normal(heads) if self.sinks else None, (self.sink_keys, self.recent_keys)
        return Case(*tensors, visible, origin, budget, sinks, self.head_dim**-0.5, self.softcap, *keys, **self.blocks)

    def intervals_of(self, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """``visible`` and ``origin``."""
        kind, keys = self.intervals, self.keys
        visible = causal_intervals(self.batch, self.queries, keys, "cpu").clone()
        origin = torch.zeros_like(visible[..., 0])
        if kind == "padding":
            origin += 13 * torch.arange(self.batch, dtype=torch.int32)[:, None]
        elif kind == "packed":
            for border in (keys // 8, keys // 4, keys * 3 // 4):
                origin[visible[..., 1] > border] = border
        elif kind == "cache":
            origin -= 21
        elif kind == "static":
            visible[..., 1] -= 41
        elif kind == "both":
            visible[...] = torch.tensor([5, keys - 2])
        elif kind == "empty":
            visible[..., 1] = 0
        elif kind == "ragged":
            visible = torch.randint(0, keys + 1, visible.shape, generator=g).sort(-1).values.to(torch.int32)
            visible[:, ::5] = 3
            return visible, visible[..., 0].clone()
        if kind in ("sliding", "cache"):
            visible[..., 0] = visible[..., 1] - keys * (2 if kind == "sliding" else 4) // 5
        visible[..., 0] = torch.maximum(visible[..., 0], origin.clamp(min=0))
        visible[..., 1] = torch.maximum(visible[..., 1], visible[..., 0])
        return visible, origin


ROWS, ALL = ("drop", "window"), ("topk", "drop", "window", "block")
BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = [
    Shape("plain", (*ALL, "dense")),
    Shape("bf16-d80-g3-transposed", ALL, BF16, 1, 2, 3, 7, head_dim=80, transposed=True),
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
    Shape("one-key", (*ALL, "codes", "pages"), group=1, queries=1, keys=1),
    Shape("full-budget", ALL, queries=17, keys=33, budget="full", sinks=True),
    Shape("forced-keys-fill-the-budget", ROWS, sink_keys=30, recent_keys=40, budget="any"),
    Shape("empty", (*ALL, "codes", "pages"), queries=3, intervals="empty", sinks=True),
    # Blocks: of other sizes, chosen by other rows, with rows that attend all.
    *(
        Shape(name, ("block",), **{"queries": 150, "keys": 150, "head_dim": 32, "budget": 40, "blocks": blocks} | more)
        for name, blocks, more in (
            ("b32-g3", {"block_size": 32}, {"dtype": FP16, "group": 3, "head_dim": 96, "queries": 70, "keys": 101}),
            ("b64-q128", {"block_size": 64, "query_block_size": 128}, {"dtype": BF16, "queries": 50, "keys": 190}),
            ("b128", {"block_size": 128}, {"dtype": BF16, "queries": 100, "keys": 300, "budget": 130, "softcap": 3.0}),
            ("blocks-left-padding", {}, {"batch": 2, "intervals": "padding", "queries": 90, "keys": 110}),
            ("stride-1", {"sample_stride": 1, "query_block_size": 32}, {"queries": 70, "keys": 130}),
            ("stride-by-the-law", {"sample_stride": None, "local_keys": 16}, {"kv_heads": 2, "group": 1}),
            ("local-keys", {"sample_stride": None, "local_keys": 64}, {"queries": 110, "keys": 230, "budget": 170}),
            ("local-keys-beyond-the-budget", {"local_keys": 100}, {"queries": 60, "keys": 230, "budget": 70}),
            ("dense-rows", {"sample_stride": None, "local_keys": 64}, {"budget": 20, "dense_below": 100}),
            (
                "packed-dense-rows",
                {"sample_stride": None, "local_keys": 16},
                {"intervals": "packed", "budget": 20, "dense_below": 40},
            ),
            ("packed-blocks", {}, {"intervals": "packed", "budget": 20}),
            ("sliding-blocks", {}, {"intervals": "sliding", "queries": 140, "keys": 170, "group": 1, "budget": 50}),
            ("min-mass", {"min_mass": 0.9, "max_factor": 8.0}, {"queries": 90, "keys": 260, "budget": 33}),
            ("min-mass-capped", {"min_mass": 0.99, "max_factor": 1.5}, {"keys": 300, "budget": 80}),
            (
                "min-mass-sliding",
                {"min_mass": 0.97, "max_factor": 8.0},
                {"keys": 300, "intervals": "sliding", "budget": 16},
            ),
        )
    ),
    # Decoding: few queries, of sequences with one origin each.
    *(
        Shape(name, tuple(ways.split(", ")), **{"queries": 1, "keys": 130, "recent_keys": 2, "group": 3} | more)
        for name, ways, more in (
            ("decode", "codes, codes with means, pages", {}),
            ("decode-bf16-g4", "codes, pages", {"dtype": BF16, "batch": 2, "kv_heads": 2, "group": 4}),
            (
                "decode-bf16-d80-g7-left-padding",
                "codes, codes with means, pages",
                {"dtype": BF16, "batch": 2, "group": 7, "head_dim": 80, "queries": 2, "intervals": "padding"},
            ),
            ("decode-fp16-d96-g1", "codes, pages", {"dtype": FP16, "group": 1, "head_dim": 96, "queries": 5}),
            ("decode-d128-sinks", "codes, pages", {"head_dim": 128, "sinks": True, "softcap": 3.0, "queries": 2}),
            ("sixteen-queries", "codes, pages", {"queries": 16, "group": 2, "budget": "per_head", "keys": 60}),
            ("decode-d192", "codes, pages", {"head_dim": 192, "value_dim": 40, "group": 1}),
            ("decode-bf16-d256", "codes", {"dtype": BF16, "head_dim": 256, "softcap": 5.0, "keys": 70}),
            ("decode-ragged", "codes", {"batch": 2, "queries": 5, "intervals": "ragged", "budget": "any"}),
            ("decode-sliding", "codes, codes with means, pages", {"queries": 5, "intervals": "sliding"}),
            ("decode-cache", "pages", {"queries": 2, "intervals": "cache"}),
            ("decode-static", "codes, pages", {"intervals": "static", "batch": 2}),
            ("decode-full-budget", "codes, pages", {"budget": "full", "keys": 77}),
            ("decode-forced-keys", "codes", {"sink_keys": 40, "recent_keys": 50, "budget": "any", "queries": 3}),
            ("budget-of-one", "codes, pages", {"budget": 1}),
            ("wide-group", "pages", {"group": 19, "budget": 40}),
            ("p32", "pages", {"keys": 331, "blocks": {"block_size": 32}, "budget": 90}),
            ("p64-transposed", "pages", {"keys": 350, "blocks": {"block_size": 64}, "budget": 130, "transposed": True}),
        )
    ),
]
DESCRIBED = {f"{shape.name}-{way}": (shape, way) for shape in SHAPES for way in shape.ways}

"""Settings and arguments: what is taken from Python, numpy, PyTorch and JSON, and refused in which words; the law."""

import dataclasses
import itertools
import json
import math
import random
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from nc_patch import KeyIndex, NCConfig, selections, sparse_attention
from nc_patch.budget import budget_of, budgets, row_budgets
from nc_patch.selections import Window

NAN, INF = math.nan, math.inf
QUERY, KEY = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 30, 8)
GIVEN = {"query": QUERY, "key": KEY, "value": KEY.clone(), "alpha": 2.0, "C": 0.5}
CODES, PAGES, MEANS = (KeyIndex.build(KEY, kind, value=KEY) for kind in ("codes", "pages", "means"))
read = NCConfig.from_json


def law(alpha=1.0, C=0.5, **options):
    """Settings from Python."""
    return NCConfig(alpha, C, **options)


def budget(n, **where):
    return NCConfig([[1.0, 2.0]] * 2 if where else 1.0, 0.5).budget(n, **where)


def of_a_model(**settings):
    return law(**settings).check_model(num_layers=3, num_heads=4)


def attend(**changes):
    return sparse_attention(**GIVEN | changes)


def index(**changes):
    return KeyIndex.build(**{"key": KEY, "kind": "codes"} | changes)


def extend(key, count):
    return MEANS.extend(key, count, torch.tensor([30, 30]), key)


def seen(first: int, last: int) -> torch.Tensor:
    """Intervals of all keys, but for one row."""
    visible = torch.tensor([0, 30], dtype=torch.int32).repeat(2, 20, 1)
    visible[1, 7] = torch.tensor([first, last])
    return visible


BEYOND = torch.stack((torch.arange(20), torch.arange(20) + 9), -1).int().expand(2, 20, 2)
# (what is called, with what, words of the message)
REFUSED = [
    *((law, {"alpha": x}, f"alpha must be a positive number, got {x}") for x in (0.0, NAN, INF)),
    *((law, {"C": x}, rf"C must be a number in \[0, 1\], got {x}") for x in (-0.1, 1.1, NAN)),
    *((law, {"max_dropped_mass": x}, rf"max_dropped_mass must .* \[0, 1\), got {x}") for x in (1.0, NAN)),
    (law, {"alpha": [1.0, -2.0]}, "alpha must be a positive number, got -2.0"),
    (law, {"alpha": [[[1.0]]]}, "alpha must be a number, a list per layer"),
    (law, {"prefill": "best"}, "prefill must be one of 'block', 'dense', 'topk', 'window', got 'best'"),
    (law, {"on_drop": "stop"}, "on_drop must be one of 'ignore', 'warn', 'raise', 'dense', got 'stop'"),
    *((law, {"track": x}, "track must be True or False, got ") for x in (1, "yes", None)),
    *((law, {"dense_layers": x}, "dense_layers must be") for x in ("0", 2, [0.5])),
    (law, {"sinkkeys": 1}, r"unknown option sinkkeys; .* Did you mean sink_keys\?"),
    *((law, {name: 1}, "unknown option") for name in ("\x1b[2J", "x" * 100_000)),
    (read, {"text": "3"}, "mapping of names to values, got int"),
    (read, {"text": "[" * 100_000 + "]" * 100_000}, "recursion"),
    (read, {"text": '{"alpha": 1' + "0" * 400 + "}"}, "alpha must be a positive number, got an integer of 1329 bits"),
    (read, {"text": '{"C": 1}'}, "alpha is missing"),
    *((budget, {"n": n}, "n must be at least 0, got -3") for n in (-3, torch.tensor([2, -3]))),
    (budget, {"n": torch.tensor([2**31])}, "n must be at most 2147483647, got"),
    *((budget, {"n": n}, "n must be an integer") for n in (2.5, True, torch.tensor([2.0]))),
    (budget, {"n": 9, "layer": None}, "alpha is given per layer: say which layer"),
    (budget, {"n": 9, "layer": 2}, "alpha is given for 2 layers, got layer 2"),
    (of_a_model, {"alpha": [1.0, 2.0]}, "alpha has 2 layers, the model has 3"),
    (of_a_model, {"C": [0.5, [0.1, 0.2, 0.3], 0.5]}, r"C\[1\] has 3 heads, the queries have 4"),
    (of_a_model, {"dense_layers": [0, 7]}, r"layers \[7\], the model has layers 0 to 2"),
    # What does not fit together.
    (attend, {"alpha": [1.0, 2.0]}, r"alpha\[0\] has 2 heads, the queries have 4"),
    (attend, {"query": QUERY[:, :3]}, "multiple of the key/value heads, got 3 and 2"),
    (attend, {"query": torch.zeros(2, 4, 40, 8)}, "at least as many keys as queries, got Lq=40 and Lk=30"),
    (attend, {"visible": BEYOND}, r"\[0, 9\] in sequence 0 of .* reaches from 0 to 1, and page means"),
    (attend, {"index": PAGES}, 'got "pages" for TopK'),
    (attend, {"index": CODES, "selection": "block"}, 'got "codes" for Block'),
    (attend, {"means": MEANS, "tail": "drop"}, r'"means" for one with tail="mean"; got "means" for TopK.*drop'),
    (attend, {"index": CODES, "key": KEY[:, :1], "value": KEY[:, :1]}, "other keys"),
    (attend, {"index": CODES, "query": torch.zeros(2, 4, 33, 8)}, "at most 32 queries"),
    (attend, {"return_kept_mass": "bounds"}, "come from codes"),
    (attend, {"index": CODES, "return_stats": True}, "every key"),
    (attend, {"track": True}, "track acts in patched models; leave it out"),
    (attend, {"is_causal": True}, "option is_causal; allowed are alpha, C, min_keys, dense_below, backend, block_size"),
    (index, {"key": KEY[0]}, "shape"),
    (index, {"kind": "bits"}, "kind must be"),
    (index, {"kind": "means"}, r"needs the values \[2, 2, 30, 'Dv'\] of the keys, got none"),
    (index, {"capacity": 10}, "capacity must be at least 30, got 10"),
    (index, {"start": torch.zeros(3)}, "start must be int"),
    *(
        (extend, {"key": key, "count": n}, rf"takes in keys like those .*float32, with at least the {n} new")
        for key, n in ((KEY.half(), 1), (KEY[:, :1], 1), (KEY, 31), (KEY, -1))
    ),
]
OPTIONS = (
    *("alpha", "C", "scale", "softcap", "sink_keys", "recent_keys", "min_keys", "dense_below", "block_size"),
    *("query_block_size", "sample_stride", "local_keys", "max_factor", "selection", "backend", "tail", "law"),
    *("return_kept_mass", "no_such_option"),
)
CHANGES = (
    *(lambda t: t[0], lambda t: t[:, :0], lambda t: t[..., :0], lambda t: torch.cat((t, t))),
    *(torch.Tensor.double, torch.Tensor.int, torch.Tensor.numpy, lambda t: t.to("meta"), lambda t: None),
)
# What stands for the default.
FINE = [(name, None) for name in ("scale", "softcap", "return_kept_mass", "sample_stride")]
# Arguments of which one is wrong, and named.
WRONG = [
    *(case for case in itertools.product(OPTIONS, (NAN, INF, -1.0, 10**400, "2", None, [], True)) if case not in FINE),
    *((name, 0) for name in ("alpha", "scale", "min_keys", "block_size", "sample_stride", "max_factor")),
    *((name, change(GIVEN[name])) for name in ("query", "key", "value") for change in CHANGES),
    *(("visible", seen(*of)) for of in ((0, 31), (0, 2**31 - 1), (-1, 30), (-(2**31), 30), (30, 0))),
    *(("visible", other) for other in (seen(0, 30).long(), seen(0, 30)[:, :, :1], seen(0, 30)[None])),
    *(("origin", other) for other in (torch.zeros(2, 20), torch.zeros(2, 21).int(), torch.zeros(2).int(), 0)),
    *(("sinks", other) for other in (torch.zeros(5), torch.zeros(1, 4), [0.0] * 4)),
    *(("index", KeyIndex.build(key, "codes", backend="torch")) for key in (torch.cat((KEY, KEY), 1), KEY[:, :, :-1])),
]
REFUSED += [(attend, {name: given}, rf"\b{name}\b.{{9}}") for name, given in WRONG]


@pytest.mark.parametrize(("call", "given", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_wrong_is_refused_by_name_in_a_short_message(call, given, words):
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        call(**given)
    assert len(str(caught.value)) < 800
    assert str(caught.value).isprintable()


# Values


def test_a_file_may_leave_settings_to_their_defaults(dense_with_few_keys):
    config = NCConfig(2.0, 0.5, prefill="block", track=True)
    values = config.to_dict()
    assert values.pop("dense_below") == 1024
    assert read(json.dumps(values)) == config != dataclasses.replace(config, dense_below=0)


@pytest.mark.parametrize("alpha", [2.0, [1.0, 2.0], [[1.0, 2.0], [3.0, 4.0]]])
def test_it_is_a_frozen_value_that_json_and_its_repr_hold(alpha):
    config = NCConfig(alpha, 0.5, prefill="block", dense_layers=[1, 0, 1], sink_keys=2, backend="torch")
    assert config.dense_layers == (0, 1)
    for other in (config, dataclasses.replace(config, track=True, on_drop="dense", max_dropped_mass=0.05)):
        assert read(other.to_json()) == other
        assert eval(repr(other), {"NCConfig": NCConfig, **vars(selections)}) == other
        assert hash(other) == hash(read(other.to_json()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 3.0
    assert (law(selection="window").prefill, law(selection="window").decode) == (Window(), Window())
    # The repr says what differs from the defaults, and stays short.
    profiled = NCConfig([[1.0, 2.0, 3.0]] * 30, [0.5] * 30, dense_below=7, selection="topk")
    layers = "alpha=<30 layers of 3 heads, 1 to 3>, C=<30 layers, 0.5 to 0.5>"
    assert repr(profiled) == f"NCConfig({layers}, selection='topk', dense_below=7)"


# Numbers of Python, numpy and PyTorch

THREES = (3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int8))
HALVES = (0.5, np.float16(0.5), np.array(0.5), torch.tensor(0.5, dtype=torch.bfloat16), Fraction(1, 2), Decimal("0.5"))


@pytest.mark.parametrize(("three", "half"), list(zip(THREES, HALVES, strict=True)), ids=repr)
def test_a_setting_and_an_argument_may_be_a_number_of_any_library(three, half):
    def settings_of(three, half, true):
        whole = {"sink_keys": three, "recent_keys": three, "min_keys": three, "dense_layers": [three, three]}
        return NCConfig(half, half, **whole, min_mass=half, max_dropped_mass=half, max_factor=three, track=true)

    config, plain = settings_of(three, half, np.True_), settings_of(3, 0.5, True)
    assert settings_of(3, 0.5, torch.tensor(True)) == plain
    assert (config, config.to_json(), config.budget(three)) == (plain, plain.to_json(), plain.budget(3))
    query = torch.randn(1, 2, 9, 4)
    expected = sparse_attention(query, query, query, alpha=2.0, scale=0.5, softcap=0.5)
    assert torch.equal(sparse_attention(query, query, query, alpha=2.0, scale=half, softcap=half), expected)


# The budget law

LAWS = [(2.0, 0.5), (4.0, 0.6), (0.5, 1.0), (1.0, 1.0), (100.0, 0.0), (3.0, 1 / 3), (1e6, 0.7), (1e-3, 0.3)]


def by_hand(n: int, alpha: float, C: float, min_keys: int, dense_below: int) -> int:
    """The law as its description has it."""
    return n if n <= dense_below else min(n, max(min_keys, math.ceil(alpha * float(n) ** C)))


@pytest.mark.parametrize("dense_below", [0, 1, 63, 1024, 10**6])
@pytest.mark.parametrize("min_keys", [1, 50])
def test_all_ways_to_a_budget_agree(dense_below, min_keys):
    draw = random.Random(dense_below)
    edges = [n for n in range(dense_below - 2, dense_below + 3) if n >= 0]
    n = torch.tensor([*range(90), 1023, 1024, 1025, *edges, 2**20, *(draw.randrange(2**20) for _ in range(200))])
    visible = torch.stack((torch.full_like(n, 5), n + 5), -1)[None].int()
    alphas, exponents = map(list, zip(*LAWS, strict=True))
    of_rows = row_budgets(visible, int(n.max()), alphas, exponents, min_keys, dense_below)
    by_head = NCConfig([alphas], [exponents], min_keys=min_keys, dense_below=dense_below)
    assert torch.equal(by_head.row_budgets(visible, int(n.max()), 0), of_rows)
    for head, (alpha, C) in enumerate(LAWS):
        law = (alpha, C, min_keys, dense_below)
        expected = [by_hand(i, *law) for i in n.tolist()]
        assert [budget_of(i, *law) for i in n.tolist()] == expected, law
        assert budgets(n.numpy(), *law).tolist() == expected, law
        assert of_rows[0, head].tolist() == expected, law
        config = NCConfig(alpha, C, min_keys=min_keys, dense_below=dense_below)
        assert config.budget(n).tolist() == expected, law
        assert [config.budget(i) for i in n.tolist()] == expected, law
        assert by_head.budget(n, 0, head).tolist() == expected, law
        assert config.row_budgets(visible, int(n.max()))[0, 0].tolist() == expected, law


@pytest.mark.parametrize("dense_below", [0, 1, 63, 200, 1000])
def test_the_largest_budget_is_that_of_the_most_expensive_length(dense_below):
    config = NCConfig([[2.0, 9.0], [1.0, 1.5]], [[0.5, 0.1], [0.3, 0.6]], dense_below=dense_below)
    for layer in range(2):
        found = [max(int(config.budget(n, layer, head)) for head in range(2)) for n in range(400)]
        for n in (1, 2, 30, 62, 63, 64, 65, 150, 199, 200, 201, 399):
            assert config.largest_budget(n, layer) == max(found[: n + 1])


def test_budgets_of_many_heads_and_of_huge_n_are_exact():
    draw = np.random.default_rng(0)
    squares, fractions = draw.integers(1, 46340, 300), [Fraction(1), Fraction(2), Fraction(5, 8), Fraction(300)]
    n = np.concatenate([squares**2 + off for off in (-1, 0, 1)] + [draw.integers(1, 2**31, 300), [0, 2**31 - 1]])
    visible = torch.from_numpy(np.stack((np.zeros_like(n), n), -1)).int()[None]
    found = row_budgets(visible, 2**31 - 1, [float(f) for f in fractions], [0.5] * 4, 1)
    for factor, of_law in zip(fractions, found[0].tolist(), strict=True):
        # ceil(sqrt(x)) of whole numbers x is exact.
        scaled = [-(-(factor.numerator**2) * int(x) // factor.denominator**2) for x in n]
        expected = [min(int(x), math.isqrt(y - 1) + 1) if x else 0 for x, y in zip(n, scaled, strict=True)]
        assert of_law == expected
        assert NCConfig(float(factor), 0.5).budget(torch.from_numpy(n)).tolist() == expected
    assert row_budgets(visible[:0], 8, [1.0, 2.0], [0.5] * 2, 1).shape == (0, 2, len(n))


def test_the_function_attends_by_the_law_alone_unless_it_is_told(dense_with_few_keys):
    query, key = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16)
    attended = lambda **given: sparse_attention(query, key, key, alpha=2.0, C=0.5, return_stats=True, **given).attended  # noqa: E731
    assert attended()[0, 0, 15:25].tolist() == [8, 9, 9, 9, 9, 10, 10, 10, 10, 10]
    assert attended(dense_below=20)[0, 0, 15:25].tolist() == [16, 17, 18, 19, 20, 10, 10, 10, 10, 10]

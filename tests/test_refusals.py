"""Calls of ``sparse_attention`` with one thing wrong with them are refused by an exception that says what."""

import itertools

import numpy as np
import pytest
import torch

from nc_patch import KeyIndex, sparse_attention

QUERY, KEY = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 30, 8)
GIVEN = {"query": QUERY, "key": KEY, "value": KEY.clone(), "alpha": 2.0, "C": 0.5}
OPTIONS = (
    *("alpha", "C", "scale", "softcap", "sink_keys", "recent_keys", "min_keys", "dense_below", "block_size"),
    *("query_block_size", "sample_stride", "local_keys", "max_factor", "selection", "backend", "tail", "law"),
    *("return_kept_mass", "no_such_option"),
)
NO_VALUES = (
    *(float("nan"), float("inf"), -float("inf"), -1.0, 10**400, "2", None, [], {}, b"1", object()),
    *(True, np.True_, torch.tensor(True), 1j, np.complex64(1)),
)
# What stands for the default.
FINE = [(name, None) for name in ("scale", "softcap", "return_kept_mass", "sample_stride")]


def others(tensor: torch.Tensor) -> list[object]:
    """What cannot stand for query, key or value."""
    dtypes = (torch.float64, torch.int32, torch.complex64, torch.bool)
    shapes = [tensor[0], tensor[:, :0], tensor[..., :0], torch.cat((tensor, tensor))]
    return [*shapes, *map(tensor.to, dtypes), tensor.to("meta"), None, tensor.tolist(), tensor.numpy()]


def seen(first: int, last: int) -> torch.Tensor:
    """Intervals of all keys, but for one row."""
    visible = torch.tensor([0, 30], dtype=torch.int32).repeat(2, 20, 1)
    visible[1, 7] = torch.tensor([first, last])
    return visible


EVERY = seen(0, 30)
WRONG = [
    *(case for case in itertools.product(OPTIONS, NO_VALUES) if case not in FINE),
    *(("sink_keys", number) for number in (3.0, np.float64(3), torch.tensor(3.0), [3])),
    *((name, 0) for name in ("alpha", "scale", "min_keys", "block_size", "sample_stride", "max_factor")),
    *((name, other) for name in ("query", "key", "value") for other in others(GIVEN[name])),
    *(("visible", seen(*of)) for of in ((0, 31), (0, 2**31 - 1), (-1, 30), (-(2**31), 30), (30, 0))),
    *(("visible", other) for other in (EVERY.long(), EVERY.float(), EVERY.bool(), EVERY[:, :, :1], EVERY[None])),
    *(("origin", torch.zeros(2, *shape, dtype=dtype)) for shape, dtype in (((20,), None), ((21,), torch.int32))),
    *(("origin", other) for other in (torch.zeros(2, dtype=torch.int32), 0, [0] * 20)),
    *(("sinks", other) for other in (torch.zeros(5), torch.zeros(1, 4), [0.0] * 4, 1.0)),
    *(("index", KeyIndex.build(key, "codes", backend="torch")) for key in (torch.cat((KEY, KEY), 1), KEY[:, :, :-1])),
]


@pytest.mark.parametrize(("name", "given"), WRONG, ids=[f"{number}-{name}" for number, (name, _) in enumerate(WRONG)])
def test_what_is_wrong_is_refused_in_words(name, given):
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b.{{9}}"):
        sparse_attention(**GIVEN | {name: given})


BEYOND = torch.stack((torch.arange(20), torch.arange(20) + 9), -1).int().expand(2, 20, 2)
CODES, PAGES, MEANS = (KeyIndex.build(KEY, kind, value=KEY) for kind in ("codes", "pages", "means"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": [1.0, 2.0]}, "given for 2 heads, query has 4"),
        ({"query": QUERY[:, :3]}, "multiple of the key/value heads, got 3 and 2"),
        ({"query": torch.zeros(2, 4, 40, 8)}, "at least as many keys as queries, got Lq=40 and Lk=30"),
        ({"visible": BEYOND}, r"\[0, 9\] in sequence 0 of .* reaches from 0 to 1, and page means"),
        ({"index": PAGES}, 'got "pages" for TopK'),
        ({"index": CODES, "selection": "block"}, 'got "codes" for Block'),
        ({"means": MEANS, "tail": "drop"}, r'"means" for one with tail="mean"; got "means" for TopK.*drop'),
        ({"index": CODES, "key": KEY[:, :1], "value": KEY[:, :1]}, "other keys"),
        ({"index": CODES, "query": torch.zeros(2, 4, 33, 8)}, "at most 32 queries"),
        ({"return_kept_mass": "bounds"}, "come from codes"),
        ({"index": CODES, "return_stats": True}, "every key"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_reason(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sparse_attention(**GIVEN | changes)

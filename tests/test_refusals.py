"""Calls of ``sparse_attention`` with one thing wrong with them are refused by an exception that says what."""

import itertools

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
NO_VALUES = (float("nan"), float("inf"), -float("inf"), -1.0, 10**400, "2", None, True, [], {}, 1j, b"1")
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


PATCHED = {"dense_layers": (0,), "track": True, "key_index": "never", "on_drop": "warn", "decode": "topk"}
BEYOND = torch.stack((torch.arange(20), torch.arange(20) + 9), -1).int().expand(2, 20, 2)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("alpha", [1.0, 2.0], "given for 2 heads, query has 4"),
        ("query", QUERY[0], r"query must be \[batch, heads, .*\], got shape \(4, 20, 8\)"),
        ("query", QUERY[:, :3], "multiple of the key/value heads, got 3 and 2"),
        ("query", QUERY.double(), "one of bfloat16, float16, float32, got torch.float64"),
        ("key", KEY.half(), "key must have query's dtype"),
        ("key", KEY[..., :4], "key must be"),
        ("value", KEY[:, :, 1:], "key must be"),
        ("value", KEY[..., :0], r"head_dim must be at least 1, .*value \(2, 2, 30, 0\)"),
        ("query", torch.zeros(2, 4, 40, 8), "at least as many keys as queries, got Lq=40 and Lk=30"),
        ("scale", float("nan"), "scale must be a positive number, got nan"),
        ("softcap", -1.0, "softcap must be a positive number or None, got -1.0"),
        ("sinks", torch.zeros(2), r"sinks must be \[4\]"),
        ("visible", EVERY.float(), r"visible must be int32 \[2, 20, 2\]"),
        ("visible", seen(0, 31), "within the keys, 0 to 30, got 0 to 31"),
        ("visible", seen(5, 3), "ends before it starts"),
        ("visible", BEYOND, r"interval \[0, 9\] in sequence 0 of the batch, which reaches from 0 to 1, and page means"),
        ("origin", torch.zeros(2, 20), r"origin must be int32 \[2, 20\]"),
        *((name, given, f"{name} acts in .*; sparse_attention takes .*sink_keys") for name, given in PATCHED.items()),
    ],
)
def test_what_is_wrong_is_refused_by_name(name, given, message):
    with pytest.raises(TypeError if name in PATCHED else ValueError, match=message):
        sparse_attention(**GIVEN | {name: given})

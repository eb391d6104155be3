"""Indexes of keys: their size, where their pages begin, and what none is made of."""

import pytest
import torch

from nc_patch import KeyIndex, sparse_attention
from nc_patch.ops.problem import causal_intervals


def test_intervals_that_begin_later_leave_the_pages_of_an_index_of_means_where_they_are():
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 16, generator=g) for heads, length in ((4, 3), (2, 77), (2, 77)))
    options = {"alpha": 1.0, "C": 0.5, "tail": "mean", "visible": causal_intervals(2, 3, 77, "cpu").clamp(min=5)}
    expected = sparse_attention(query, key, value, origin=torch.zeros(2, 3, dtype=torch.int32), **options)
    means = KeyIndex.build(key, "means", value=value)
    found = sparse_attention(query, key, value, means=means, **options)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("D", [64, 128])
def test_an_index_takes_the_bytes_it_promises(D):
    key = torch.randn(1, 8, 8192, D).bfloat16()
    kv_bytes = 2 * key.nbytes
    codes, pages, means = (KeyIndex.build(key, kind, value=key) for kind in ("codes", "pages", "means"))
    assert pages.nbytes() <= kv_bytes / 8
    assert means.nbytes() <= kv_bytes / 16 + 8  # and the origin
    if D == 128:
        assert codes.nbytes() <= 0.27 * kv_bytes
        grown = KeyIndex.build(key[:, :, :8191], "codes")
        grown.extend(key, 1, torch.tensor([8192]))
        assert grown.nbytes() <= 0.27 * kv_bytes * 8320 / 8192


KEY = torch.randn(1, 2, 50, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": KEY[0]}, "shape"),
        ({"kind": "bits"}, "kind must be"),
        ({"kind": "means"}, r"needs the values \[1, 2, 50, 'Dv'\] of the keys, got none"),
        ({"capacity": 10}, "capacity must be at least 50, got 10"),
        ({"start": torch.zeros(3)}, "start must be int"),
    ],
)
def test_what_no_index_can_be_built_from_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        KeyIndex.build(**{"key": KEY, "kind": "codes"} | changes)
    index, end = KeyIndex.build(KEY, "means", value=KEY), torch.tensor([50])
    for keys, count in ((KEY.half(), 1), (KEY[:, :1], 1), (KEY, 51), (KEY, -1)):
        with pytest.raises(match=rf"takes in keys like those .*float32, with at least the {count} new"):
            index.extend(keys, count, end, KEY)

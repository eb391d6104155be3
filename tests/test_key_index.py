"""Indexes of keys: what they hold, on every backend, what decoding by them keeps, and which uses are refused."""

import pytest
import torch
from attention_cases import HARD, TOLERANCE, random_case
from operations import BACKENDS, EACH, assert_summarises, device_of, problem_of

from nc_patch import KeyIndex, sparse_attention
from nc_patch.ops.problem import causal_intervals
from nc_patch.selections import Block


def test_bounds_are_narrow_where_attention_is_sharp():
    g = torch.Generator().manual_seed(0)
    key, value = torch.randn(1, 2, 4000, 64, generator=g), torch.randn(1, 2, 4000, 64, generator=g)
    query = 2 * torch.randn(1, 6, 1, 64, generator=g)
    index = KeyIndex.build(key, "codes")
    result = sparse_attention(query, key, value, alpha=4.0, C=0.6, index=index, return_kept_mass="bounds")
    lower, upper = result.kept_mass_bounds.unbind(-1)
    dense = sparse_attention(query, key, value, alpha=4.0, C=0.6, return_stats=True)
    torch.testing.assert_close(result.output, dense.output, atol=1e-6, rtol=1e-5)
    assert bool((lower <= dense.kept_mass).all())
    assert bool((dense.kept_mass <= upper).all())
    assert float((upper - lower).max()) < 0.05


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


@EACH
@pytest.mark.parametrize("kind", HARD)
def test_page_statistics_are_those_of_the_pages_keys_whatever_they_are(kind, backend):
    for seed in range(4 if backend == "triton" else 12):
        g = torch.Generator().manual_seed(seed)
        length, D = int(torch.randint(1, 70, (1,), generator=g)), int(torch.randint(1, 20, (1,), generator=g))
        key = HARD[kind](torch.randn(2, 2, length, D, generator=g))
        start, first = torch.randint(-20, length, (2,), generator=g), int(torch.randint(0, length, (1,), generator=g))
        given, end = key.to(device_of(backend)), torch.full((2,), length, device=device_of(backend))
        options = {"start": start.to(given.device), "capacity": 128, "backend": backend}
        index = KeyIndex.build(given, "pages", end=end - (length - first), **options)
        index.extend(given, length - first, end)
        for b, begin in enumerate(start.tolist()):
            for j in range(8):
                codes, scales = (t[b, :, j].cpu() for t in index.tensors())
                first, last = begin + 16 * j, begin + 16 * j + 16
                if last > length or last <= 0:  # no key, or a page that is not whole yet
                    assert not codes.any()
                    assert not scales.any()
                    continue
                for h in range(2):
                    assert_summarises(codes[h], scales[h], key[b, h, max(first, 0) : last])


@EACH
def test_pages_that_hold_nan_come_before_all_but_the_first_and_the_querys_own(backend):
    key, query = torch.randn(2, 1, 1, 160, 16)[0].repeat(1, 2, 1, 1), torch.randn(1, 4, 1, 16)
    key[0, 0, 20:100:16] = torch.nan
    value, visible = torch.randn(1, 2, 160, 16), causal_intervals(1, 1, 160, "cpu")
    for pages, expected in ((2, [0, 9]), (3, [0, 1, 9])):
        budget = torch.full((1, 1, 1), 16 * pages, dtype=torch.int32)
        problem = problem_of(*(t.to(device_of(backend)) for t in (query, key, value, visible, budget)))
        index = KeyIndex.build(problem.key, "pages", backend=backend)
        problem = problem._replace(key_index=index.tensors(), page_size=16, stats=True)
        mask = Block(size=16).mask(
            problem, problem.query.double() @ problem.key.double().repeat_interleave(2, 1).mT, True
        )
        assert mask[0, 0, 0].view(10, 16).any(-1).nonzero()[:, 0].tolist() == expected
        result = Block(size=16).run(problem, backend)
        assert result.attended.tolist() == [[[16 * pages]] * 4]
        assert bool(result.output[:, :2].isfinite().all()) == (1 not in expected)
        for of_other_heads in (result.output, result.lse, result.kept_mass):
            assert of_other_heads[:, 2:].isfinite().all()


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "torch"])
@pytest.mark.parametrize("kind", ["codes", "means", "pages"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_other_backends_build_pytorchs_indexes_to_rounding(kind, dtype, backend):
    for seed in range(3 if backend == "triton" else 12):
        case = random_case(seed, 300, dtype)
        options = {
            "value": case.value,
            "start": case.origin[:, -1],
            "end": torch.full((len(case.key),), case.key.shape[2]),
        }
        found, expected = (
            KeyIndex.build(
                case.key.to(device_of(name)),
                kind,
                backend=name,
                **{k: v.to(device_of(name)) for k, v in options.items()},
            ).tensors()
            for name in (backend, "torch")
        )
        for b, first in enumerate(case.origin[:, -1].tolist()):
            whole = (case.key.shape[2] - first) // 16
            of_kind = {"codes": (first, None), "means": (first // 16, first // 16 + whole), "pages": (0, whole)}
            rows = slice(*of_kind[kind])
            for mine, its in zip(found, expected, strict=True):
                mine, its = (t[b] if t.shape[2:] == case.key.shape[3:] else t[b, :, rows] for t in (mine, its))
                tolerance = 1.0 if mine.dtype == torch.int8 else TOLERANCE[dtype]
                torch.testing.assert_close(mine.float().cpu(), its.float(), atol=tolerance, rtol=1e-5)


KEY, QUERY = torch.randn(1, 2, 50, 16), torch.randn(1, 4, 1, 16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key": "key"}, TypeError, r"key must be a tensor .*got str"),
        ({"key": KEY[0]}, ValueError, "shape"),
        ({"key": KEY.double()}, ValueError, "bfloat16, float16, float32, got torch.float64"),
        ({"kind": "bits"}, ValueError, "kind must be"),
        ({"kind": "means"}, ValueError, r"needs the values \[1, 2, 50, 'Dv'\] of the keys, got none"),
        ({"capacity": 10}, ValueError, "capacity must be at least 50, got 10"),
        ({"capacity": "50"}, TypeError, "capacity must be an integer, got '50'"),
        ({"start": torch.zeros(3)}, ValueError, "start must be int"),
        ({"start": [0]}, TypeError, r"start must be an int tensor .1., got list"),
        ({"end": torch.ones(1, dtype=torch.int32, device="meta")}, ValueError, "end must be int"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"backend": "tritn"}, ValueError, "backend must be one of"),
    ],
)
def test_what_no_index_can_be_built_from_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        KeyIndex.build(**{"key": KEY, "kind": "codes"} | changes)


CODES, PAGES, MEANS = (KeyIndex.build(KEY, kind, value=KEY) for kind in ("codes", "pages", "means"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"index": PAGES}, ValueError, 'got "pages" for TopK'),
        ({"index": CODES, "selection": "block"}, ValueError, 'got "codes" for Block'),
        ({"index": "codes"}, TypeError, r"made by KeyIndex.build\(key, ...\), got str"),
        ({"means": "codes"}, TypeError, r"made by KeyIndex.build\(key, ...\), got str"),
        ({"means": MEANS, "tail": "drop"}, ValueError, r'"means" for one with tail="mean"; got "means" for TopK.*drop'),
        ({"index": CODES, "key": torch.cat((KEY, KEY), 2)}, ValueError, "other keys"),
        ({"index": CODES, "query": QUERY.expand(1, 4, 33, 16)}, ValueError, "at most 32 queries"),
        ({"return_kept_mass": "bounds"}, ValueError, "come from codes"),
        ({"return_kept_mass": "exact"}, ValueError, 'must be "bounds"'),
        ({"index": CODES, "return_stats": True}, ValueError, "every key"),
        ({"return_stats": "yes"}, TypeError, "return_stats must be True or False, got 'yes'"),
    ],
)
def test_wrong_uses_of_an_index_are_refused(options, error, message):
    given = {"query": QUERY, "key": KEY, "alpha": 2.0} | options
    with pytest.raises(error, match=message):
        sparse_attention(value=given["key"], **given)


def test_keys_that_an_index_cannot_take_in_are_refused():
    index, end = KeyIndex.build(KEY, "means", value=KEY), torch.tensor([50])
    for keys, count in ((KEY.half(), 1), (KEY[:, :1], 1), (KEY, 51), (KEY, -1)):
        with pytest.raises(ValueError, match=rf"takes in keys like those .*float32, with at least the {count} new"):
            index.extend(keys, count, end, KEY)

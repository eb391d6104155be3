"""Decoding by codes and by pages on the PyTorch backend, against the float64 definition."""

import pytest
import torch
from attention_cases import Case, random_case, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import implementation, problem_of, problem_of_case, summarize_pages

from nc_patch import KeyIndex, sparse_attention
from nc_patch.ops.problem import causal_intervals
from nc_patch.selections import Block, TopK
from nc_patch.selections.block.pages import page_count
from nc_patch.selections.block.torch_decode import torch_block_decode
from nc_patch.selections.topk.codes import KeyCodes, channel_moments, encode_keys

DECODED = 5


def decode_case(seed: int) -> Case:
    """A random case of at most five queries a sequence, each sequence with one origin."""
    case = random_case(seed)
    case.query, case.budget = case.query[:, :, -DECODED:], case.budget[..., -DECODED:].contiguous()
    case.origin = case.origin[:, -1:].expand(-1, case.query.shape[2]).contiguous()
    visible = case.visible[:, -DECODED:].contiguous()
    visible[..., 0] = torch.maximum(visible[..., 0], case.origin)
    visible[..., 1] = torch.maximum(visible[..., 1], visible[..., 0])
    case.visible = visible
    case.budget = torch.minimum(case.budget, (visible[..., 1] - visible[..., 0])[:, None])
    return case


# Keys on which bounds are easily wrong. Their scores are exact in float32, so that ties are ties in every arithmetic.
def all_equal(key: torch.Tensor) -> torch.Tensor:
    return key[:, :, :1].round().expand(key.shape).clone()


def one_outlier_a_page(key: torch.Tensor) -> torch.Tensor:
    key[:, :, ::16] *= 64
    return key


def huge_norms(key: torch.Tensor) -> torch.Tensor:
    key[:, :, ::7] *= 2.0**60
    return key


def denormals(key: torch.Tensor) -> torch.Tensor:
    return key * 2.0**-130


def far_from_zero(key: torch.Tensor) -> torch.Tensor:
    return key.round() + torch.arange(key.shape[-1]) * 4.0


def heavy_tails(key: torch.Tensor) -> torch.Tensor:
    return key.pow(5).round()


def clustered(key: torch.Tensor) -> torch.Tensor:
    return key * 0.125 + key[:, :, :1].round() * (torch.arange(key.shape[2]) % 3)[:, None]


KINDS = [lambda key: key, all_equal, one_outlier_a_page, huge_norms, denormals, far_from_zero, heavy_tails, clustered]


def codes_of(case: Case) -> KeyCodes:
    center, spread = channel_moments(case.key, case.visible[:, -1, 0], case.visible[:, -1, 1])
    return KeyCodes(*encode_keys(case.key, center, spread), center, spread)


def topk_decode(case: Case, codes: KeyCodes):
    problem = problem_of_case(case, key_index=tuple(codes), bounds=True)
    return implementation(TopK(case.sink_keys, case.recent_keys, "drop"), problem)


@given(st.integers(0, 10**6), st.integers(0, len(KINDS) - 1))
@settings(max_examples=2000, deadline=None, derandomize=True)
def test_codes_choose_the_references_keys_and_bound_the_kept_mass(seed, kind):
    case = decode_case(seed)
    if kind in (1, 5, 6):
        case.query = (case.query * 4).round()
    case.key = KINDS[kind](case.key)
    expected = case.reference("topk")
    output, _, bounds = topk_decode(case, codes_of(case))
    # What float32 rounds off a large logit; of still larger ones a single key has all of the softmax.
    group = case.query.shape[1] // case.key.shape[1]
    logits = case.scale * case.query.double() @ case.key.double().repeat_interleave(group, 1).transpose(-1, -2)
    largest = float(logits.abs().max())
    assert relative_error(output, expected.output) < 1e-5 + (5e-7 * largest if largest < 1e5 else 0.0)
    lower, upper = bounds.double().unbind(-1)
    assert bool((lower <= expected.kept_mass).all())
    assert bool((expected.kept_mass <= upper).all())


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


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["key", "value"])
def test_nan_and_inf_reach_only_the_rows_that_attend_them(what, where):
    for seed in range(40):
        case = decode_case(seed)
        tensor = getattr(case, where)
        tensor[0, 0, tensor.shape[2] // 2, 0] = what
        expected = case.reference("topk")
        output, _, bounds = topk_decode(case, codes_of(case))
        assert torch.equal(output.isnan(), expected.output.isnan()), seed
        sound = ~expected.output.isnan()
        torch.testing.assert_close(output.double()[sound], expected.output[sound], atol=1e-5, rtol=1e-5)
        assert not bool(bounds.isnan().any())


@pytest.mark.parametrize("block", range(4))
def test_pages_are_chosen_and_attended_as_defined(block):
    for seed in range(block * 60, block * 60 + 60):
        case = decode_case(seed)
        B, _, Lk, _ = case.key.shape
        end, first = torch.full((B,), Lk), torch.zeros(B, dtype=torch.int64)
        pages = summarize_pages(
            case.key, case.origin[:, 0], end, first, page_count(Lk, case.block_size), case.block_size
        )
        output, lse, kept_mass, attended = torch_block_decode(
            problem_of_case(case, key_index=tuple(pages), page_size=case.block_size, stats=True)
        )[:4]
        expected = case.reference("pages")
        assert relative_error(output, expected.output) < 1e-5, seed
        assert torch.equal(attended, expected.attended), seed
        torch.testing.assert_close(lse.double(), expected.lse, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(kept_mass.double(), expected.kept_mass, atol=1e-5, rtol=1e-5)


def test_each_query_of_a_call_chooses_pages_as_it_would_alone():
    g = torch.Generator().manual_seed(2)
    key, value = torch.randn(1, 2, 300, 32, generator=g), torch.randn(1, 2, 300, 32, generator=g)
    query = torch.randn(1, 4, 8, 32, generator=g)
    index = KeyIndex.build(key, "pages", block_size=16)
    options = {"alpha": 2.0, "C": 0.6, "selection": "block", "block_size": 16}
    together = sparse_attention(query, key, value, index=index, **options)
    for i in range(8):
        length = 300 - 7 + i
        keys, values = key[:, :, :length], value[:, :, :length]
        alone = KeyIndex.build(keys, "pages", block_size=16)
        result = sparse_attention(query[:, :, i : i + 1], keys, values, index=alone, **options)
        torch.testing.assert_close(result[:, :, 0], together[:, :, i], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("D", [64, 128])
def test_an_index_takes_the_bytes_it_promises(D):
    key = torch.randn(1, 8, 8192, D).bfloat16()
    kv_bytes = 2 * key.nbytes
    codes, pages = KeyIndex.build(key, "codes"), KeyIndex.build(key, "pages")
    assert pages.nbytes() <= kv_bytes / 8
    if D == 128:
        assert codes.nbytes() <= 0.27 * kv_bytes
        grown = KeyIndex.build(key[:, :, :8191], "codes")
        grown.extend(key, 1, torch.tensor([8192]))
        assert grown.nbytes() <= 0.27 * kv_bytes * 8320 / 8192


def test_wrong_uses_of_an_index_are_refused():
    key, query = torch.randn(1, 2, 50, 16), torch.randn(1, 4, 1, 16)
    codes, pages = KeyIndex.build(key, "codes"), KeyIndex.build(key, "pages")
    refused = lambda match, *tensors, **options: pytest.raises(ValueError, match=match)  # noqa: E731
    with refused('got "pages" for TopK'):
        sparse_attention(query, key, key, alpha=2.0, index=pages)
    with refused('got "codes" for Block'):
        sparse_attention(query, key, key, alpha=2.0, selection="block", index=codes)
    with refused("other keys"):
        sparse_attention(query, torch.cat((key, key), 2), torch.cat((key, key), 2), alpha=2.0, index=codes)
    with refused("at most 32 queries"):
        sparse_attention(query.expand(1, 4, 33, 16), key, key, alpha=2.0, index=codes)
    with refused("come from codes"):
        sparse_attention(query, key, key, alpha=2.0, return_kept_mass="bounds")
    with refused('must be "bounds"'):
        sparse_attention(query, key, key, alpha=2.0, return_kept_mass="exact")
    with refused("every key"):
        sparse_attention(query, key, key, alpha=2.0, index=codes, return_stats=True)
    with refused("kind must be"):
        KeyIndex.build(key, "bits")
    with refused("capacity"):
        KeyIndex.build(key, "codes", capacity=10)
    with refused("start must be int"):
        KeyIndex.build(key, "codes", start=torch.zeros(3))
    with refused("shape"):
        KeyIndex.build(key[0], "codes")
    with refused("block_size must be at least 1, got 0"):
        KeyIndex.build(key, "pages", block_size=0)
    with refused("backend must be one of"):
        KeyIndex.build(key, "codes", backend="tritn")
    with refused("bfloat16, float16, float32, got torch.float64"):
        KeyIndex.build(key.double(), "codes")
    with refused("end must be int"):
        KeyIndex.build(key, "codes", end=torch.ones(len(key), dtype=torch.int32, device="meta"))


@given(st.integers(0, 10**6), st.integers(0, len(KINDS) - 1))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_page_statistics_are_those_of_the_pages_keys_whatever_they_are(seed, kind):
    g = torch.Generator().manual_seed(seed)
    length, D = int(torch.randint(1, 70, (1,), generator=g)), int(torch.randint(1, 20, (1,), generator=g))
    key = KINDS[kind](torch.randn(2, 2, length, D, generator=g))
    origin = torch.randint(-20, length, (2,), generator=g)
    end = torch.full((2,), length)
    codes, scales = summarize_pages(key, origin, end, torch.zeros(2, dtype=torch.int64), 6, 16)
    for b, h, j in ((b, h, j) for b in range(2) for h in range(2) for j in range(6)):
        first = int(origin[b]) + 16 * j
        page = key[b, h, max(first, 0) : max(min(first + 16, length), 0)].double()
        apart, mean, deviation = codes[b, h, j].double() * scales[b, h, j, :, None].double()
        if not len(page):
            assert not codes[b, h, j].any()
            assert not scales[b, h, j].any()
            continue
        # A code is off by half a step, and by a whole one of the smallest numbers.
        step = lambda x: 0.51 * float(x.abs().max()) / 127 + 1e-37  # noqa: E731
        distance = (page - page.mean(0)).square().sum(-1)
        far = (page - apart).abs().amax(-1).argmin()
        assert float((page[far] - apart).abs().max()) <= step(page[far])
        assert float(distance[far]) >= float(distance.max()) * (1 - 1e-5)
        # Equal distances are decided by rounding, so that any of the farthest may be apart.
        others = [page[torch.arange(len(page)) != i] for i in (distance >= distance.max() * (1 - 1e-5)).nonzero()[:, 0]]
        if len(page) == 1:
            assert not codes[b, h, j, 1:].any()
            continue
        largest = float(page.abs().max())
        found = [
            float((other.mean(0) - mean).abs().max()) <= step(other.mean(0)) + 1e-5 * largest
            and float((other.var(0, correction=0) - codes[b, h, j, 2] * scales[b, h, j, 2].double() ** 2).abs().max())
            <= step(other.var(0, correction=0)) + 1e-5 * largest**2
            for other in others
        ]
        assert any(found)
        assert (deviation >= 0).all()


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["key", "value"])
def test_nan_and_inf_in_a_page_reach_only_the_rows_that_attend_it(what, where):
    g = torch.Generator().manual_seed(3)
    key, value = torch.randn(1, 2, 333, 24, generator=g), torch.randn(1, 2, 333, 24, generator=g)
    query = torch.randn(1, 4, 2, 24, generator=g)
    options = {"alpha": 40.0, "C": 0.0, "selection": "block", "block_size": 16, "return_stats": True}
    plain = sparse_attention(query, key, value, index=KeyIndex.build(key, "pages", block_size=16), **options)
    broken = {"key": key.clone(), "value": value.clone()}
    broken[where][0, 0, 100, 3] = what
    index = KeyIndex.build(broken["key"], "pages", block_size=16)
    result = sparse_attention(query, broken["key"], broken["value"], index=index, **options)
    # The other key/value head does not notice.
    assert torch.equal(result.output[:, 2:], plain.output[:, 2:])
    if where == "key":
        assert index.tensors()[1][0, 0, 6].isnan().all()
        assert not index.tensors()[1][0, 1].isnan().any()
        # Its page is attended before all others, and the attended numbers stay what the budget allows.
        assert result.output[:, :2].isnan().all() or what != torch.nan
        assert torch.equal(result.attended, plain.attended)
    else:
        assert torch.equal(index.tensors()[0], KeyIndex.build(key, "pages", block_size=16).tensors()[0])
        sound = ~result.output.isnan()
        torch.testing.assert_close(result.output[sound], plain.output[sound])
        assert not result.output[0, :2, :, :3].isnan().any()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_pages_that_hold_nan_come_before_all_but_the_first_and_the_querys_own(backend):
    key, query = torch.randn(1, 1, 160, 16), torch.randn(1, 2, 1, 16)
    key[0, 0, 20:100:16] = torch.nan
    index = KeyIndex.build(key, "pages", block_size=16)
    value, visible = torch.randn(1, 1, 160, 16), causal_intervals(1, 1, 160, "cpu")
    for pages, expected in ((2, [0, 9]), (3, [0, 1, 9])):
        budget = torch.full((1, 1, 1), 16 * pages, dtype=torch.int32)
        problem = problem_of(query, key, value, visible, budget, origin=torch.zeros(1, 1, dtype=torch.int32))
        problem = problem._replace(key_index=index.tensors(), page_size=16)
        mask = Block(size=16).mask(problem, query.double() @ key.double().transpose(2, 3), decode=True)
        assert mask[0, 0, 0].view(10, 16).any(-1).nonzero()[:, 0].tolist() == expected
        result = Block(size=16).run(problem, backend)
        assert result.attended.tolist() == [[[16 * pages]] * 2]
        assert bool(result.output.isfinite().all()) == (1 not in expected)


# Not where page weights lie further apart than float32 can hold, or logits closer than its rounding.
@pytest.mark.parametrize("kind", [all_equal, huge_norms, denormals, heavy_tails, clustered])
def test_pages_of_hard_keys_are_chosen_as_defined(kind):
    for seed in range(300, 330):
        case = decode_case(seed)
        case.key = kind(case.key)
        B, _, Lk, _ = case.key.shape
        end, first = torch.full((B,), Lk), torch.zeros(B, dtype=torch.int64)
        pages = summarize_pages(
            case.key, case.origin[:, 0], end, first, page_count(Lk, case.block_size), case.block_size
        )
        output, _, _, attended = torch_block_decode(
            problem_of_case(case, key_index=tuple(pages), page_size=case.block_size, stats=False)
        )[:4]
        expected = case.reference("pages")
        assert torch.equal(attended, expected.attended), seed
        assert relative_error(output, expected.output) < 1e-4, seed

"""Every way of attending, and every index, on every backend, against the float64 definitions.

``test_interpreter.py`` runs this file in Triton's interpreter, and ``scripts/gpu_check.sh`` on a GPU.
"""

import copy
from functools import cache
from itertools import product

import pytest
import torch
from attention_cases import DESCRIBED, HARD, SPOILED, TOLERANCE, WAYS, Case, Shape, check, index_of
from operations import BACKENDS, EACH, assert_close, device_of
from tiny_models import random_ids, tiny_model

from nc_patch import KeyIndex, patch_model
from nc_patch.ops import rows
from nc_patch.ops.means import PageMeans
from nc_patch.ops.problem import AttentionResult
from nc_patch.selections.index import extend
from nc_patch.selections.topk.codes import encode_keys

pytestmark = pytest.mark.usefixtures("small_tiles")
OTHERS = [backend for backend in BACKENDS if backend != "torch"]
FP32_BF16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@cache
def described(name: str) -> tuple[Case, AttentionResult]:
    """A case and its reference."""
    shape, way = DESCRIBED[name]
    case = shape.case()
    return case, case.reference(way)


@EACH
@pytest.mark.parametrize("name", DESCRIBED)
def test_described_cases_equal_the_reference(name, backend):
    (shape, way), (case, expected) = DESCRIBED[name], described(name)
    # The kept mass of blocks takes a pass over all keys.
    plain = shape.intervals == "causal" and not shape.sinks and not shape.softcap
    stats = shape.spoiled is None and not (WAYS[way].selection == "block" and plain)
    bounds = WAYS[way].index == "codes"
    check(way, case, backend, expected, stats=stats, bounds=bounds)
    if shape.spoiled is None and (backend != "triton" or shape.name in ("plain", "decode")):
        check(way, case, backend, expected, stats=not stats, bounds=bounds)


@EACH
@FP32_BF16
@pytest.mark.parametrize("way", ["drop", "window", "block", "codes", "pages"])
def test_a_broken_value_reaches_the_rows_that_attend_it_in_its_column_alone(way, dtype, backend):
    """In kernels it may reach other rows of its tile too."""
    few = WAYS[way].index is not None
    group, queries, keys = (3, 5, 130) if few else (1, 100, 130) if way == "block" else (1, 40, 53)
    case = Shape("broken", (), dtype, 1, 1, group, queries, keys, 80, budget="full" if way == "block" else "law").case()
    broken = [(keys - 5, 3, torch.nan), (keys - 2, 50, torch.inf)]
    if way == "block":  # in a tile that all rows see whole, and in two that some do not
        broken = [(3, 7, torch.inf), (60, 3, torch.nan), (101, 50, -torch.inf)]
    for key, column, what in broken:
        case.value[:, :, key, column] = what
    output, expected = case.run(way, backend).output, case.reference(way).output
    sound, touched = output.isfinite(), [column for _, column, _ in broken]
    assert expected[..., touched].isnan().any((0, 1, 2)).all()
    assert not sound[expected.isnan()].any()
    assert_close(output[sound], expected[sound], TOLERANCE[dtype])
    assert sound[..., [column for column in range(80) if column not in touched]].all()


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("name", [name for name, (_, way) in DESCRIBED.items() if way == "block"])
def test_the_choice_of_blocks_and_its_audit_are_pytorchs(name, backend):
    case = DESCRIBED[name][0].case(1)
    found, expected = (case.run("block", each, audit_seed=5) for each in (backend, "torch"))
    assert_close(found.audit, expected.audit.double(), 1e-4)
    assert torch.equal(found.attended, expected.attended)


@EACH
@pytest.mark.parametrize("size", [64, 6000])
def test_a_prompt_in_more_parts_gives_the_same(size, backend, monkeypatch):
    sizes = {"batch": 2, "group": 1, "queries": 150, "keys": 150, "head_dim": 32, "budget": 40}
    case = Shape("parts", (), intervals="padding", blocks={"min_mass": 0.8}, **sizes).case()
    for way in ("drop", "window", "block") if backend == "torch" else ("block",):
        whole = case.run(way, backend, audit_seed=0)
        with monkeypatch.context() as patch:
            patch.setattr(rows, "SCORES_PER_BLOCK", size)
            if backend == "triton":
                from nc_patch.selections.block import prefill

                for name in ("SCORE_BYTES", "MOST_SCORE_BYTES"):
                    patch.setattr(prefill, name, size)
            parts = case.run(way, backend, audit_seed=0)
        for found, expected in zip(parts, whole, strict=True):
            if expected is not None:  # tiles of other shapes may sum in another order
                assert_close(found, expected.double(), 1e-6)


@EACH
@pytest.mark.parametrize(
    ("way", "queries", "keys"), [("pages", 1, 161), ("pages", 3, 161), ("codes", 1, 97), ("codes", 5, 64)]
)
def test_a_step_takes_its_keys_into_an_index_that_is_then_the_one_of_all_keys(way, queries, keys, backend):
    batch = 3 if way == "pages" else 2
    case = Shape("step", (), torch.bfloat16, batch, queries=queries, keys=keys, head_dim=80, budget=50).case()
    if way == "pages":  # the last key ends a page of the first sequence, begins one, and lies within one
        case.origin[:] = torch.tensor([1, 0, -22], dtype=torch.int32)[:, None]
    else:  # the second sequence is shorter: what lies beyond its end is not read
        case.origin[:], case.visible[1, :, 1] = 5, case.visible[1, :, 1] - 20
    case.visible[..., 0] = case.origin.clamp(min=0)
    case.budget = case.budget.minimum(case.rows)
    taken = case.problem(way, backend, new=queries)
    if way == "pages":  # which may be views of something larger
        whole = case.problem(way, backend)
        taken = taken._replace(key_index=tuple(torch.cat((x, x), 2)[:, :, : x.shape[2]] for x in taken.key_index))
    else:
        taken = taken._replace(means=PageMeans(*index_of(taken, "means", backend, queries).tensors()))
        whole, way = extend(copy.deepcopy(taken), way, backend), "codes with means"
    found, expected = (case.selection(way).run(problem, backend) for problem in (taken, whole))
    torch.testing.assert_close(found.output, expected.output, atol=1e-6, rtol=1e-5)
    for b, (start, end) in enumerate(case.visible[:, -1].tolist()):
        of_means = slice(start // 16, start // 16 + (end - start) // 16)
        held = [slice(None)] * 2 if way == "pages" else [of_means] * 2 + [slice(start, end)] * 3 + [slice(None)] * 2
        for mine, its, part in zip(taken.kept(), whole.kept(), held, strict=True):
            torch.testing.assert_close(mine[b, :, part], its[b, :, part], rtol=0, atol=0, equal_nan=True)


@EACH
def test_a_patched_model_generates_as_with_pytorch(backend):
    ids = random_ids(1, 35).to(device_of(backend))
    tokens, logits = {}, {}
    for name in ("torch", backend):
        model = tiny_model("llama", num_hidden_layers=1, num_key_value_heads=1, num_attention_heads=2).to(ids.device)
        patch_model(model, 1.0, 0.5, tail="mean", backend=name, key_index="always")
        made = model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
        tokens[name], logits[name] = made.sequences.tolist(), torch.cat(made.logits)
    assert tokens[backend] == tokens["torch"]
    torch.testing.assert_close(logits[backend], logits["torch"], atol=1e-4, rtol=1e-4)


@EACH
@FP32_BF16
@pytest.mark.parametrize("kind", [None, "huge norms", "denormals", "far apart", "infinite", "nan"])
def test_codes_bound_the_keys_and_are_pytorchs_to_rounding(kind, dtype, backend):
    key, found = Shape("codes", (), dtype, 2, 2, keys=60, head_dim=80).case().key, {}
    key = key if kind is None else SPOILED[kind](key).to(dtype)
    for name in ("torch", backend):  # of the second call's 40 keys 3 lie before the first sequence
        device = device_of(name)
        index = KeyIndex.build(key[:, :, :40].to(device), "codes", end=torch.tensor([20, 40]).to(device), backend=name)
        index.extend(key.to(device), 40, torch.tensor([37, 60]).to(device))
        found[name] = [tensor.cpu() for tensor in index.tensors()]
    (codes, scale, bound, center, spread), expected = found[backend], found["torch"]
    if kind is None:
        torch.testing.assert_close([center, spread], expected[3:], atol=1e-5, rtol=1e-5)
    exact = encode_keys(key, center, spread)
    for b, end in enumerate((37, 60)):
        own, part = codes[b, :, :end], (b, slice(None), slice(end))
        assert (own.int() - exact[0][part].int()).abs().max() <= 1
        x = (key[part].double() - center[b, :, None]) / spread[b, :, None]
        left_over = (x - scale[part][..., None].double() * own.double()).norm(dim=-1)
        sound = x.isfinite().all(-1) & exact[2][part].isfinite()
        assert (left_over <= bound[part])[sound].all()
        # A code that lies between two may be rounded to either side.
        assert (bound[part] <= 1.02 * exact[2][part].double() + 1e-6).all()
        assert torch.equal(bound[part].isinf(), exact[2][part].isinf())


def assert_summarises(codes: torch.Tensor, scales: torch.Tensor, page: torch.Tensor) -> None:
    """``codes [3, D]`` and ``scales [3]`` are those of the keys ``[n, D]``; of the farthest any may be apart."""
    page, n = page.double(), len(page)
    apart, mean, root = codes.double() * scales[:, None].double()
    # A code is off by half a step, and by a whole one of the smallest numbers.
    step = lambda x: 0.502 * float(x.abs().max()) / 127 + 1e-37  # noqa: E731
    distance = (page - page.mean(0)).square().sum(-1)
    far = (page - apart).abs().amax(-1).argmin()
    assert float((page[far] - apart).abs().max()) <= step(page[far])
    assert float(distance[far]) >= float(distance.max()) * (1 - 1e-5)
    if n == 1:
        assert not codes[1:].any()
        return
    largest = float(page.abs().max())
    variance = codes[2] * scales[2].double() ** 2
    assert (root >= 0).all()
    # Equal distances are decided by rounding.
    for i in (distance >= distance.max() * (1 - 1e-5)).nonzero()[:, 0]:
        others = page[torch.arange(n) != i]
        of_mean, of_variance = others.mean(0), others.var(0, correction=0)
        if float((of_mean - mean).abs().max()) <= step(of_mean) + 1e-5 * largest:
            off = float((of_variance - variance).abs().max())
            assert off <= step(of_variance) + 1e-5 * largest**2
            return
    raise AssertionError("no mean of the others is that of the page")


@EACH
@pytest.mark.parametrize("kind", HARD)
def test_page_statistics_are_those_of_the_pages_keys_whatever_they_are(kind, backend):
    begins = (-5, -15)  # a cache has dropped the first keys, and of the first pages 11 and one are left
    for seed in range(2 if backend == "triton" else 12):
        key = HARD[kind](torch.randn(2, 2, 48, 1 + 3 * seed, generator=torch.Generator().manual_seed(seed)))
        options = {"start": torch.tensor(begins, device=device_of(backend)), "backend": backend}
        codes, scales = KeyIndex.build(key.to(device_of(backend)), "pages", **options).tensors()
        for b, h, j in product(range(2), range(2), range(3)):
            first = begins[b] + 16 * j
            assert_summarises(codes[b, h, j].cpu(), scales[b, h, j].cpu(), key[b, h, max(first, 0) : first + 16])


@EACH
def test_queries_may_be_of_any_size_or_no_number(backend):
    case = Shape("queries", (), queries=6, keys=130, group=3, recent_keys=2, unequal=0.0).case()
    case.query *= torch.logspace(-36, 30, 6)[:, None]
    check("codes", case, backend, bounds=True)
    case.query[0, 1, 3, 5] = torch.nan
    check("codes", case, backend, stats=False, bounds=True)

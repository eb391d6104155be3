"""The tail in the Triton kernels against the float64 reference: on a GPU, and in Triton's interpreter.

As in ``test_triton_kernels.py`` the interpreter needs a process of its own, which the last test starts.
"""

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, relative_error
from tiny_models import random_ids, tiny_model

pytest.importorskip("triton", reason="the kernels need triton")

from gpu_semantics import check_as_on_a_gpu
from operations import INTERPRETED, on_kernel_device, problem_of, problem_of_case
from small_plans import plan_with

from nc_patch import patch_model
from nc_patch.ops.means import PageMeans, page_means, page_starts
from nc_patch.ops.problem import AttentionResult
from nc_patch.ops.triton import launch as triton_launch
from nc_patch.ops.triton.means import triton_page_means
from nc_patch.ops.triton.split import PARTS_AT_ONCE
from nc_patch.selections import TopK
from nc_patch.selections.topk import decode as triton_decode_topk
from nc_patch.selections.topk import plan as topk_plan
from nc_patch.selections.topk.codes import KeyCodes, channel_moments, encode_keys
from nc_patch.selections.topk.layouts import Means

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes by which short inputs cross many tiles in the interpreter."""
    tiles = triton_launch.Tiles(16, 32, 4, 1)
    for module, pages in ((triton_launch, 32), (topk_plan, 16)):
        monkeypatch.setattr(module, "tiles_for", lambda *_, keys=pages: replace(tiles, keys=keys))
    plan_with(monkeypatch)


def case_of(
    kind: str, queries: int, keys: int, dtype: torch.dtype = torch.float32, group: int = 2, seed: int = 0
) -> Case:
    """Rows of one sequence (``"causal"``, ``"sliding"``), of one after padding, or of several that are packed."""
    g = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, heads, length, width, generator=g).to(dtype)
        for heads, length, width in ((group, queries, 16), (1, keys, 16), (1, keys, 24))
    )
    end = torch.arange(keys - queries + 1, keys + 1, dtype=torch.int32)
    origin = torch.zeros_like(end)
    if kind == "padding":
        origin += 5
    elif kind == "negative":  # the first keys of the sequence are gone
        origin -= 7
    elif kind == "packed":
        borders = torch.tensor([0, keys // 4 + 1, keys - keys // 2])
        origin = borders[torch.searchsorted(borders, end - 1, right=True) - 1].int()
    start = (end - 50).maximum(origin) if kind == "sliding" else origin.clamp(min=0)
    visible = torch.stack((start.minimum(end), end), -1)[None]
    n = (visible[..., 1] - visible[..., 0])[:, None]
    budget = (torch.rand(1, group, queries, generator=g) * 0.5 * (n + 1)).int().clamp(min=1).minimum(n)
    softcap, sinks = (2.0, torch.randn(group, generator=g)) if kind in ("padding", "packed") else (0.0, None)
    return Case(query, key, value, visible, origin[None].contiguous(), budget, sinks, 0.25, softcap, 2, 3)


def means_of(case: Case) -> PageMeans:
    return page_means(case.key, case.value, page_starts(case.visible, case.origin, case.key.shape[2]))


def on(device: str, case: Case) -> list[torch.Tensor | None]:
    tensors = (case.query, case.key, case.value, case.visible, case.budget, case.sinks)
    return [None if t is None else t.to(device) for t in tensors]


def assert_equals_reference(case: Case, output: torch.Tensor, lse: torch.Tensor) -> None:
    expected = case.reference("topk", tail=True)
    tolerance = TOLERANCE[case.query.dtype]
    assert relative_error(output.cpu(), expected.output) < tolerance
    assert torch.allclose(lse.cpu().double(), expected.lse, atol=10 * tolerance)
    # A tail that does nothing would pass otherwise.
    assert relative_error(case.reference("topk").output, expected.output) > 10 * tolerance


@on_kernel_device
@pytest.mark.parametrize(
    ("kind", "dtype", "queries", "keys"),
    [
        ("causal", torch.bfloat16, 5, 300),
        ("padding", torch.float32, 20, 60),
        ("negative", torch.float32, 7, 45),
        ("sliding", torch.float32, 9, 90),
        ("packed", torch.float32, 50, 50),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_whole_rows_equal_the_reference(kind, dtype, queries, keys, device):
    case = case_of(kind, queries, keys, dtype)
    output, lse, kept_mass, *_ = prefill(case, device, means_of(case), stats=True)
    assert_equals_reference(case, output, lse)
    expected = case.reference("topk").kept_mass
    assert torch.allclose(kept_mass.cpu().double(), expected, atol=10 * TOLERANCE[dtype])


def prefill(case: Case, device: str, means: PageMeans, stats: bool = False) -> AttentionResult:
    chosen = TopK(case.sink_keys, case.recent_keys, "mean")
    problem = problem_of(*on(device, case), scale=case.scale, softcap=case.softcap, origin=case.origin.to(device))
    return chosen.prefill_triton(problem._replace(means=PageMeans(*(t.to(device) for t in means)), stats=stats))


def decode(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    center, spread = channel_moments(case.key, case.visible[:, -1, 0], case.visible[:, -1, 1])
    codes = KeyCodes(*(t.to(device) for t in (*encode_keys(case.key, center, spread), center, spread)))
    result = decode_by(case, device, codes, means_of(case), bounds=True)
    return result.output, result.lse, result.kept_mass_bounds


def decode_by(case: Case, device: str, codes: KeyCodes, means: PageMeans, bounds: bool) -> AttentionResult:
    problem = problem_of_case(
        case, device, means=PageMeans(*(t.to(device) for t in means)), key_index=tuple(codes),
        most=int(case.budget.max()), bounds=bounds, stats=True,
    )  # fmt: skip
    return TopK(case.sink_keys, case.recent_keys).decode_triton(problem)


@on_kernel_device
@pytest.mark.parametrize("kind", ["causal", "packed", "sliding"])
def test_decoding_equals_the_reference(kind, device):
    case = case_of(kind, 2, 90)
    if kind == "packed":  # rows of two sequences in one call
        case = replace(case, visible=case.visible.clone(), origin=case.origin.clone())
        case.origin[0, 0] = case.visible[0, 0, 0] = 3
        case.visible[0, 0, 1] = 45
        case.budget = case.budget.clamp(max=20)
    output, lse, bounds = decode(case, device)
    assert_equals_reference(case, output, lse)
    kept_mass = case.reference("topk").kept_mass
    assert (bounds[..., 0].cpu() <= kept_mass + 1e-6).all()
    assert (bounds[..., 1].cpu() >= kept_mass - 1e-6).all()


@on_kernel_device
def test_rows_whose_list_overflows_have_their_tail(device, monkeypatch):
    case = case_of("padding", 1, 60)
    plan_with(monkeypatch, segment=3)
    output, lse, _ = decode(case, device)
    assert_equals_reference(case, output, lse)


@on_kernel_device
def test_many_parts_are_joined_in_groups(device, monkeypatch):
    case = case_of("causal", 2, 700)
    plan_with(monkeypatch, splits=18)
    plans = []
    planned = triton_decode_topk.plan_for
    recording = lambda *args: plans.append(planned(*args)) or plans[-1]  # noqa: E731
    monkeypatch.setattr(triton_decode_topk, "plan_for", recording)
    output, lse, bounds = decode(case, device)
    assert plans[0].parts > 18 > PARTS_AT_ONCE
    assert_equals_reference(case, output, lse)
    kept_mass = case.reference("topk").kept_mass
    assert (bounds[..., 0].cpu() <= kept_mass + 1e-6).all()
    assert (bounds[..., 1].cpu() >= kept_mass - 1e-6).all()


@on_kernel_device
@pytest.mark.parametrize("decoding", [False, True], ids=["rows", "decoding"])
@pytest.mark.parametrize("whole", [False, True], ids=["some", "all"])
def test_a_page_that_is_attended_whole_hides_what_its_mean_holds(decoding, whole, device):
    """A page without a key left over for any row of a program has no part in the tail, though its mean is infinite."""
    case = case_of("causal", 2, 64)
    case.sink_keys, case.recent_keys = 16, 0
    case.budget = torch.tensor([[[16, 16 if whole else 8]] * 2], dtype=torch.int32)
    means = means_of(case)
    means.value[:, :, 0] = torch.inf
    if decoding:
        center, spread = channel_moments(case.key, case.visible[:, -1, 0], case.visible[:, -1, 1])
        codes = KeyCodes(*(t.to(device) for t in (*encode_keys(case.key, center, spread), center, spread)))
        output = decode_by(case, device, codes, means, bounds=False).output
    else:
        output = prefill(case, device, means).output
    expected = case.reference("topk", tail=True).output
    if whole:
        assert relative_error(output.cpu(), expected) < 1e-5
    else:  # it may reach the other row too, which shares a program
        assert not output[:, :, 1].isfinite().any()


@on_kernel_device
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_means_are_those_of_pytorch(dtype, device):
    g = torch.Generator().manual_seed(0)
    key, value = (torch.randn(2, 1, 93, width, generator=g).to(dtype) for width in (16, 70))
    # The interpreter cuts what does not fit 16 bits.
    close = {"rtol": 2**-7 if dtype == torch.bfloat16 else 1e-6, "atol": 1e-6}
    origin = torch.tensor([[0] * 20 + [20] * 33 + [53] * 40, [3] * 93], dtype=torch.int32)
    visible = torch.stack((origin.clamp(min=0), torch.arange(1, 94, dtype=torch.int32).expand(2, -1)), -1)
    key_rows, value_rows = key.to(device), value.to(device)
    starts = page_starts(visible, origin, 93)
    found = triton_page_means(key_rows, value_rows, starts.to(device))
    for ours, theirs in zip(found, page_means(key, value, starts), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, **close)
    for begin, first, count in (([0, 5], [0, 5], 93), ([-3, 17], [40, 92], 1)):
        of, at = torch.tensor(begin, dtype=torch.int32), torch.tensor(first)
        kept = {name: [key.new_zeros(2, 1, 6, 16), key.new_zeros(2, 1, 6, 70)] for name in ("torch", "triton")}
        Means.write(kept["torch"], [key, of, at, at, value], count, 0, "torch")
        kept["triton"] = [t.to(device) for t in kept["triton"]]
        tensors = [key_rows, of.to(device), at.to(device), at.to(device), value_rows]
        Means.write(kept["triton"], tensors, count, 0, "triton")
        for ours, theirs in zip(kept["triton"], kept["torch"], strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, **close)


@on_kernel_device
def test_a_patched_model_generates_as_with_pytorch(device):
    ids = random_ids(1, 35).to(device)
    tokens, logits = {}, {}
    for backend in ("torch", "triton"):
        model = tiny_model("llama", num_hidden_layers=1, num_key_value_heads=1, num_attention_heads=2).to(device)
        patch_model(model, 1.0, 0.5, tail="mean", backend=backend, key_index="always")
        made = model.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
        tokens[backend], logits[backend] = made.sequences.tolist(), torch.cat(made.logits)
    assert tokens["triton"] == tokens["torch"]
    torch.testing.assert_close(logits["triton"], logits["torch"], atol=1e-4, rtol=1e-4)


def test_means_that_do_not_fit_are_refused():
    case = case_of("causal", 2, 40)
    means = means_of(case)
    problem = problem_of_case(case)
    for tail, message in (
        (
            PageMeans(means.key[:, :, :2], means.value),
            r"means of keys must be float32 \[1, 1, 3, 16\] on cpu, got float32 \[1, 1, 2, 16\] on cpu",
        ),
        (PageMeans(means.key, means.value[..., :8]), r"means of values must be float32 \[1, 1, 4, 24\]"),
        (PageMeans(*(t.half() for t in means)), "means of keys must be float32"),
    ):
        with pytest.raises(ValueError, match=message):
            TopK().prefill_triton(problem._replace(means=tail))


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_every_case_in_the_interpreter():
    check_as_on_a_gpu(__file__)

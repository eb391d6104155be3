"""Block attention in PyTorch: its three steps apart, its options, and that neighbours change nothing."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, random_case, relative_error
from operations import problem_of, problem_of_case, reference_attention, run_blocks, selection_of

from nc_patch import KeyIndex, NCConfig, sparse_attention
from nc_patch.ops.problem import causal_intervals
from nc_patch.selections import Block
from nc_patch.selections.block import blocks
from nc_patch.selections.block.blocks import BlockChoice, BlockOptions, make_plan, plan_of
from nc_patch.selections.block.definition import block_choice
from nc_patch.selections.block.torch_attend import attend_blocks
from nc_patch.selections.block.torch_choose import choose_blocks


def run(case: Case, want_stats: bool = True, **options: Any) -> tuple[torch.Tensor, ...]:
    result = run_blocks(case, stats=want_stats, **options)
    return *result[:4], result.enlarged


def peaked(seed: int, B: int, n: int, Hq: int = 4, Hkv: int = 2, D: int = 16) -> tuple[torch.Tensor, ...]:
    """Query, key and value whose attention is sparse: keys drift slowly, and some queries repeat an early key."""
    g = torch.Generator().manual_seed(seed)
    drift = torch.randn(B, Hkv, n, D, generator=g).cumsum(2)
    key = drift / drift.norm(dim=-1, keepdim=True) * 4 + torch.randn(B, Hkv, n, D, generator=g) * 0.3
    query = key.repeat_interleave(Hq // Hkv, 1) + torch.randn(B, Hq, n, D, generator=g)
    query[:, :, n // 2 :: 3] = query[:, :, : n - n // 2 : 3]
    return query, key, torch.randn(B, Hkv, n, D, generator=g)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "options",
    [
        {"query_block_size": 128, "sample_stride": 16, "local_keys": 0},
        {"query_block_size": 32, "sample_stride": 1},
        {"sample_stride": 4},
        {"sample_stride": 64, "block_size": 64, "local_keys": 100},
        {"sample_stride": None, "local_keys": 64},
        {"min_mass": 0.8371},
        {"min_mass": 0.6173, "max_factor": 1.5, "query_block_size": 128, "sample_stride": 8},
        {"min_mass": 0.7119, "sample_stride": None, "local_keys": 16, "block_size": 32},
    ],
    ids=lambda options: ", ".join(f"{name}={value}" for name, value in options.items()),
)
def test_every_setting_equals_the_reference(options):
    for seed in range(100, 112):
        case = replace(random_case(seed, longest=300), **options)
        expected = case.reference("block")
        output, lse, kept_mass, attended, _ = run(case)
        assert torch.equal(attended, expected.attended), seed
        assert relative_error(output, expected.output) < 1e-5, seed
        assert torch.allclose(lse.double(), expected.lse, atol=1e-4), seed
        assert torch.allclose(kept_mass.double(), expected.kept_mass, atol=1e-5), seed


def choice_of_the_definition(case: Case) -> BlockChoice:
    """What float64 chooses for a case."""
    key = case.key.double().repeat_interleave(case.query.shape[1] // case.key.shape[1], 1)
    scores = case.scale * (case.query.double() @ key.transpose(2, 3))
    scores = case.softcap * torch.tanh(scores / case.softcap) if case.softcap else scores
    return block_choice(problem_of_case(case), scores, selection_of("block", **case.block_settings()))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("min_mass", [None, 0.7731], ids=["law", "min_mass"])
def test_the_chosen_blocks_are_those_of_the_definition(min_mass):
    dense, mixed = 0, 0
    for seed in range(300, 340):
        case = replace(random_case(seed, longest=300), min_mass=min_mass)
        problem, options = problem_of_case(case), selection_of("block", **case.block_settings())
        plan = make_plan(problem, options)
        choice, added = choose_blocks(problem, plan, options)
        expected = choice_of_the_definition(case)
        assert torch.equal(choice.block_counts, expected.block_counts), seed
        most = expected.block_indices.shape[-1]
        assert torch.equal(choice.block_indices[..., :most], expected.block_indices), seed
        assert bool((choice.block_indices[..., most:] == -1).all()), seed
        assert torch.equal(added, expected.block_counts - plan.law), seed
        unscored = [samples == 0 for *_, samples in plan.listed]
        dense, mixed = dense + all(unscored), mixed + (any(unscored) and not all(unscored))
    assert dense > 0
    assert mixed > 3, "cases in which some query blocks attend everything and some do not"


def packed_case(seed: int) -> Case:
    """Two rows of three packed sequences each, of other lengths."""
    case = random_case(seed, longest=10)
    query, key, value = peaked(seed, 2, 300)
    visible = causal_intervals(2, 300, 300, "cpu").clone()
    for b, starts in enumerate(((0, 37, 200, 300), (0, 150, 151, 300))):
        for first, last in itertools.pairwise(starts):
            visible[b, first:last, 0] = first
    budget = ((visible[..., 1] - visible[..., 0]) // 4 + 1)[:, None]
    tensors = {"query": query, "key": key, "value": value, "visible": visible, "budget": budget, "sinks": None}
    return replace(case, **tensors, origin=visible[..., 0].clone(), block_size=16)


@pytest.mark.parametrize("min_mass", [None, 0.913])
def test_packed_sequences_equal_the_reference(min_mass):
    case = replace(packed_case(3), min_mass=min_mass)
    expected = case.reference("block")
    output, _, _, attended, _ = run(case)
    assert torch.equal(attended, expected.attended)
    assert relative_error(output, expected.output) < 1e-5


@pytest.mark.usefixtures("poisoned_memory")
def test_the_attend_step_equals_the_reference_given_the_same_blocks():
    for seed in range(200, 230):
        case = random_case(seed, longest=300)
        problem = problem_of_case(case, stats=True)
        plan = make_plan(problem, selection_of("block", **case.block_settings()))
        lowest, width = plan.table[:, 6], plan.table[:, 7]
        N, Hkv = len(plan.listed), case.key.shape[1]
        most = int(width.max()) if N else 0
        indices = torch.full((N, Hkv, most), -1, dtype=torch.int32)
        counts = torch.zeros(N, Hkv, dtype=torch.int32)
        g = torch.Generator().manual_seed(seed)
        for i, h in itertools.product(range(N), range(Hkv)):
            # Rows with nothing among the chosen blocks would be NaN, as in dense attention: keep all that some see.
            available = torch.arange(int(lowest[i]), int(lowest[i] + width[i]), dtype=torch.int32)
            few = 1 + int(torch.randint(0, len(available), (1,), generator=g))
            taken = available[torch.randperm(len(available), generator=g)[:few]].sort().values
            counts[i, h], indices[i, h, :few] = few, taken
        choice = BlockChoice(indices, counts)
        expected = reference_attention(
            *(case.query, case.key, case.value),
            visible=case.visible,
            budget=case.budget,
            selection="block",
            scale=case.scale,
            softcap=case.softcap,
            sinks=case.sinks,
            origin=case.origin,
            **case.block_settings(),
            choice=choice,
        )
        result = attend_blocks(problem, plan, choice, case.block_size)
        assert torch.equal(result.attended, expected.attended), seed
        held = expected.attended > 0
        assert relative_error(result.output[held], expected.output[held]) < 1e-5, seed


def test_a_nan_reaches_only_the_rows_that_attend_it():
    query, key, value = peaked(0, 1, 300)
    value[0, 0, 40] = torch.nan
    case = replace(packed_case(0), query=query, key=key, value=value)
    case.visible, case.origin, case.budget = case.visible[:1], case.origin[:1], case.budget[:1]
    expected = case.reference("block").output
    output = run(case)[0]
    assert bool(output.isnan().any())
    assert torch.equal(output.isnan(), expected.isnan())


@pytest.mark.parametrize("options", [{}, {"min_mass": 0.9}])
def test_a_full_budget_is_dense_attention(options):
    query, key, value = peaked(1, 2, 333)
    full = sparse_attention(query, key, value, alpha=400.0, selection="block", dense_below=0, **options)
    few = sparse_attention(query, key, value, alpha=1.0, selection="block", dense_below=333, **options)
    assert torch.equal(full, few)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert relative_error(full, dense) < 1e-6


def test_a_sequence_scores_alike_alone_and_in_a_padded_batch():
    query, key, value = peaked(2, 2, 400)
    options = {"alpha": 4.0, "C": 0.5, "selection": "block", "dense_below": 0, "min_mass": 0.8}
    padding = 77
    visible = causal_intervals(2, 400, 400, "cpu").clone()
    visible[1, :, 0] = padding
    visible[1, :padding, 1] = padding
    origin = torch.zeros(2, 400, dtype=torch.int32)
    origin[1] = padding
    together = sparse_attention(query, key, value, visible=visible, origin=origin, **options)
    alone = sparse_attention(*(t[1:, :, padding:] for t in (query, key, value)), **options)
    assert relative_error(together[1:, :, padding:], alone) < 1e-6
    assert relative_error(together[:1], sparse_attention(query[:1], key[:1], value[:1], **options)) < 1e-6
    assert not together[1, :, :padding].any()


def test_many_chunks_equal_one(monkeypatch):
    case = packed_case(4)
    whole = run(case, min_mass=0.91)
    monkeypatch.setattr(blocks, "SCORES_AT_ONCE", 5000)
    parts = run(case, min_mass=0.91)
    assert relative_error(parts[0], whole[0]) < 1e-6
    assert torch.equal(parts[3], whole[3])
    assert torch.equal(parts[4], whole[4])


@pytest.mark.parametrize(("local_keys", "budget"), [(0, 192.0), (64, 208.0)])
def test_the_one_distant_block_that_a_query_block_looks_for_is_found(local_keys, budget):
    g = torch.Generator().manual_seed(5)
    topics = torch.randn(16, 1, 16, generator=g)
    key = (topics + 0.1 * torch.randn(16, 64, 16, generator=g)).view(1, 1, 1024, 16)
    query = (2 * topics.roll(8, 0) + 0.1 * torch.randn(16, 64, 16, generator=g)).view(1, 1, 1024, 16)
    options = {"alpha": budget, "selection": "block", "dense_below": 0, "return_stats": True}
    value = torch.randn(1, 1, 1024, 16)
    late = sparse_attention(query, key, value, local_keys=local_keys, **options).kept_mass[..., 512:]
    window = sparse_attention(query, key, key, **options | {"selection": "window"}).kept_mass[..., 512:]
    assert late.mean() > 0.9
    assert window.mean() < 0.5


def test_min_mass_adds_blocks_within_its_factor_and_never_takes_any_away():
    query, key, value = peaked(6, 1, 1024)
    law = {"alpha": 2.0, "C": 0.5, "selection": "block", "dense_below": 0, "return_stats": True}
    by_law = sparse_attention(query, key, value, **law)
    more = sparse_attention(query, key, value, min_mass=0.9, max_factor=3.0, **law)
    most = sparse_attention(query, key, value, min_mass=0.9, max_factor=1000.0, **law)
    assert bool((more.attended >= by_law.attended).all())
    assert bool((most.attended >= more.attended).all())
    assert by_law.kept_mass.mean() < more.kept_mass.mean() < most.kept_mass.mean()
    assert by_law.enlarged is None
    assert more.enlarged.shape == (4, 2)
    assert bool((more.enlarged[:, 0] == 16).all())
    assert 0 < more.enlarged[:, 1].sum() <= most.enlarged[:, 1].sum()
    # A query block of a key/value head is enlarged where its last row, which sees most, attends more than by the law.
    grown = (most.attended > by_law.attended)[0].view(2, 2, 16, 64).any((1, 3)).sum(-1)
    assert torch.equal(most.enlarged[:, 1], grown.repeat_interleave(2).float())
    problem = problem_of(
        *(query, key, value, causal_intervals(1, 1024, 1024, "cpu")),
        NCConfig(2.0, 0.5, dense_below=0).row_budgets(causal_intervals(1, 1024, 1024, "cpu"), 1024),
        scale=0.25,
    )
    plan = plan_of(problem, BlockOptions(min_mass=0.9, max_factor=1000.0))
    kept = most.kept_mass[0, :, plan.samples.long()].double()
    for number in plan.sample_owner.unique():
        of_heads = kept[:, plan.sample_owner == number].view(2, -1).mean(-1)
        assert bool((of_heads >= 0.9 - 1e-5).all()), "of the scored rows, for each key/value head"


def test_what_an_audit_compares_with_is_the_kept_mass_of_the_rows_that_chose():
    query, key, value = peaked(7, 2, 1024)
    visible = causal_intervals(2, 1024, 1024, "cpu")
    budget = NCConfig(4.0, 0.5, dense_below=300).row_budgets(visible, 1024)
    problem = problem_of(query, key, value, visible, budget, scale=0.25, stats=True)
    options = Block(min_mass=0.5, max_factor=1.0)  # by which rows share out their softmax, not their highest scores
    result, plan = options.run(problem, "torch"), plan_of(problem, options)
    expected = torch.full((len(plan.listed), 4), torch.nan)
    choose_blocks(problem, plan, options, expected)
    for number, (batch, *_, first_sample, samples) in enumerate(plan.listed):
        rows = plan.samples[first_sample : first_sample + samples].long()
        true = result.kept_mass[batch, :, rows].mean(-1) if samples else torch.ones(4)
        assert torch.allclose(expected[number], true, atol=1e-5)
    dense = [samples == 0 for *_, samples in plan.listed]
    assert dense == [last <= 300 for _, _, last, *_ in plan.listed]
    scored = torch.zeros(2, 1024, dtype=torch.bool)
    scored[plan.blocks.batch.long()[plan.sample_owner.long()], plan.samples.long()] = True
    sparse = torch.tensor([not d for d in dense])[plan.owner]
    kept = result.kept_mass.movedim(1, 0)
    assert kept[:, scored].mean() > kept[:, sparse & ~scored].mean(), "the rows that chose keep more, not less"


def test_nothing_grows_with_the_square_of_the_length():
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()
    n = 12000  # Lq * Lk * heads in float32 would be 1.15 GB
    query, key, value = peaked(8, 1, n, Hq=2, Hkv=1)
    visible = causal_intervals(1, n, n, "cpu")
    budget = torch.full((1, 1, n), 400, dtype=torch.int32).minimum(visible[..., 1][:, None])
    before = process.memory_info().rss
    problem, options = problem_of(query, key, value, visible, budget, scale=0.25), BlockOptions()
    plan = make_plan(problem, options)
    choice, _ = choose_blocks(problem, plan, options)
    attend_blocks(problem, plan, choice, options.size)
    assert process.memory_info().rss - before < 200e6


@pytest.mark.parametrize("queries", [1, 3, 200])
@pytest.mark.parametrize("start", [0, 12, 27])
def test_a_budget_of_all_keys_attends_them_wherever_intervals_begin_and_end(start, queries):
    g = torch.Generator().manual_seed(queries)
    query, key, value = (
        torch.randn(1, heads, length, 8, generator=g) for heads, length in ((4, queries), (2, 333), (2, 333))
    )
    end = torch.arange(33, 33 + queries, dtype=torch.int32)
    visible = torch.stack(((end - 33 + start).clamp(max=33 + start), end), -1)[None]
    options = {"visible": visible, "origin": torch.zeros(1, queries, dtype=torch.int32), "alpha": 1e6, "dense_below": 0}
    expected = sparse_attention(query, key, value, **options, selection="dense")
    for block_size in (16, 32):
        found = sparse_attention(query, key, value, selection="block", block_size=block_size, **options)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        index = KeyIndex.build(key, "pages", block_size=block_size)
        if queries <= 32:
            found = sparse_attention(
                query, key, value, selection="block", block_size=block_size, index=index, **options
            )
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

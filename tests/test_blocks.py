"""Block-sparse prefill: the plan of query blocks, the choice of key blocks, what its options promise, and the audit.

The audit has no bias, and an interval that holds the truth as often as it says.
"""

import pytest
import torch
from attention_cases import Shape
from operations import problem_of_case

from nc_patch import sparse_attention
from nc_patch.ops.problem import causal_intervals
from nc_patch.selections import Block
from nc_patch.selections.block import blocks
from nc_patch.selections.block.audit import AUDIT_COLUMNS, audited_rows
from nc_patch.selections.block.blocks import BlockOptions, plan_of
from nc_patch.stats import MassCounts

SIZES = {"kv_heads": 2, "head_dim": 16}


def test_strides_are_the_powers_of_two_nearest_to_the_length_over_twice_the_mean_budget_of_heads():
    expected = {1024: 2, 4607: 2, 5000: 4, 18_000: 4, 20_000: 8, 65_536: 8, 131_072: 16, 262_144: 16, 300_000: 32}
    seen = torch.tensor([*expected], dtype=torch.int32)
    counts = (12 * seen.double().sqrt() / 16).ceil().int()  # blocks of 16 of a budget of 12 n^0.5
    assert blocks.strides_of(seen, counts[:, None], BlockOptions()).tolist() == [*expected.values()]
    unlike = torch.stack((counts // 4, counts * 2 - counts // 4), -1)
    assert blocks.strides_of(seen, unlike, BlockOptions()).tolist() == [*expected.values()]


def test_min_mass_enlarges_some_query_blocks_and_all_keep_as_much():
    law, more = Block(), Block(min_mass=0.9, max_factor=1000.0)
    problem = problem_of_case(Shape("enlarged", queries=1024, keys=1024, **SIZES).case(), stats=True)
    (by_law, enlarged), plan = (of.run(problem, "torch") for of in (law, more)), plan_of(problem, more)
    # A query block of a key/value head is enlarged where its last row, which sees most, attends more than by the law.
    grown = (enlarged.attended > by_law.attended)[0].view(2, 2, 16, 64).any((1, 3))
    assert 0 < grown.sum() < 2 * 2 * 16
    kept = enlarged.kept_mass[0, :, plan.samples.long()].double()
    for number in plan.sample_owner.unique():
        of_heads = kept[:, plan.sample_owner == number].view(2, -1).mean(-1)
        assert bool((of_heads >= 0.9 - 1e-5).all()), "of the scored rows, for each key/value head"


def test_intervals_that_a_caller_changes_between_calls_count_and_nothing_is_left_on_them():
    query, key, value = (torch.randn(1, 1, 300, 8) for _ in range(3))
    visible = causal_intervals(1, 300, 300, "cpu").clone()
    origin = torch.zeros(1, 300, dtype=torch.int32)
    options = {"alpha": 40.0, "selection": "block", "dense_below": 0, "visible": visible, "origin": origin}
    before = dict(vars(visible))
    whole = sparse_attention(query, key, value, **options)
    visible[0, :, 0] = (visible[0, :, 1] - 30).clamp(min=0)
    changed = sparse_attention(query, key, value, **options)
    assert not torch.allclose(whole, changed)
    again = sparse_attention(query, key, value, **options | {"visible": visible.clone(), "origin": origin.clone()})
    assert torch.equal(changed, again)
    assert vars(visible) == before


@pytest.mark.parametrize(
    ("intervals", "dense_below", "options"),
    [
        ("causal", 0, {}),
        (("padding", 0, 150), 0, {"min_mass": 0.7}),
        (("packed", 250), 0, {"query_block_size": 128, "sample_stride": 64, "local_keys": 0}),
        (("sliding", 200, 0), 0, {}),
        ("causal", 200, {"sample_stride": 16}),
    ],
    ids=str,
)
def test_the_audit_is_unbiased_and_its_interval_holds_the_truth(intervals, dense_below, options):
    sizes = {"batch": 2, "queries": 600, "keys": 600, **SIZES}
    case = Shape("audited", intervals=intervals, dense_below=dense_below, **sizes).case()
    problem, chosen = problem_of_case(case), Block(**options)
    results = [chosen.run(problem._replace(audit_seed=seed), "torch") for seed in range(60)]
    kept_mass = chosen.run(problem._replace(stats=True), "torch").kept_mass.double()
    seen = (case.rows > 0).expand(2, 4, 600)
    by_head = (kept_mass * seen).sum((0, 2)) / seen.sum((0, 2))
    true = torch.cat((by_head, by_head.mean()[None]))
    rows, kept, variance, freedom, count = torch.stack([r.audit.double() for r in results]).unbind(-1)
    means, errors = kept / rows, variance.sqrt() / rows
    assert bool((count[:, :-1] == 2 * audited_rows(600)).all())
    assert bool((freedom == count[:, :1] - 2).all())
    assert torch.equal(count[:, -1], count[:, :-1].sum(1))
    of_mean = means.std(0) / len(results) ** 0.5
    assert bool(((means.mean(0) - true).abs() < 4 * of_mean).all()), (means.mean(0), true, of_mean)
    # What it says of its own spread is what its spread is.
    assert bool((errors.mean(0) / means.std(0) > 0.7).all())
    assert bool((errors.mean(0) / means.std(0) < 1.5).all())
    held = []
    for result in results:
        counts = MassCounts()
        counts.add_audit(result.audit)
        found = counts.summary()
        lower, upper = (torch.tensor([*found[f"{edge}_by_head"], found[edge]]) for edge in ("lower", "upper"))
        held.append((lower <= true) & (true <= upper))
    assert torch.stack(held).double().mean() >= 0.88  # 95 % is what it says


def test_sequences_shorter_than_the_audit_and_empty_ones():
    case = Shape("short", (), batch=2, queries=3, keys=3, budget=1, **SIZES).case()
    problem = problem_of_case(case, audit_seed=0)
    one, none = problem.visible.clone(), torch.zeros_like(problem.visible)
    one[1] = 0
    for visible, rows in ((one, 3), (none, 0)):
        result = Block().run(problem._replace(visible=visible), "torch")
        audit = dict(zip(AUDIT_COLUMNS, result.audit.T.tolist(), strict=True))
        assert audit["rows"] == [rows] * 4 + [4 * rows]
        assert audit["kept_mass"] == pytest.approx(audit["rows"])
        assert audit["variance"] == pytest.approx([0.0] * 5, abs=1e-8)

"""The audit of prefill by blocks: without bias, with an interval that holds the truth as often as it says."""

import itertools

import pytest
import torch
from attention_cases import DESCRIBED, peaked, random_case
from operations import assert_close, problem_of, problem_of_case

from nc_patch import NCConfig
from nc_patch.functional import attend
from nc_patch.ops.backends import has_numba
from nc_patch.ops.problem import AttentionResult, causal_intervals
from nc_patch.selections.block.audit import AUDIT_COLUMNS, audited_rows
from nc_patch.stats import MassCounts

N = 600


def intervals(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``visible`` and ``origin`` of two sequences of a batch."""
    visible = causal_intervals(2, N, N, "cpu").clone()
    if kind == "padded":
        visible[1, :150, 1] = 150
        visible[1, :, 0] = 150
    elif kind == "packed":
        visible[1, 250:, 0] = 250
    origin = visible[..., 0].clone()
    if kind == "sliding":
        visible[..., 0] = (visible[..., 1] - 200).clamp(min=0)
    return visible, origin


def attended(tensors, kind: str, seed: int, **options) -> AttentionResult:
    query, key, value = tensors
    visible, origin = intervals(kind)
    config = NCConfig(4.0, 0.5, prefill="block", **{"dense_below": 0, **options})
    given = (query, key, value, visible, config.row_budgets(visible, N, 0))
    return attend(problem_of(*given, scale=0.25, origin=origin, stats=True, audit_seed=seed), config.prefill, "torch")


def truth(result: AttentionResult, kind: str) -> torch.Tensor:
    """The true mean kept mass of each head's rows, and of all."""
    visible, _ = intervals(kind)
    seen = (visible[..., 1] > visible[..., 0])[:, None].expand(result.kept_mass.shape)
    by_head = (result.kept_mass.double() * seen).sum((0, 2)) / seen.sum((0, 2))
    return torch.cat((by_head, by_head.mean()[None]))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("plain", {}),
        ("padded", {"min_mass": 0.7}),
        ("packed", {"query_block_size": 128, "sample_stride": 64, "local_keys": 0}),
        ("sliding", {}),
        ("plain", {"dense_below": 200, "sample_stride": 16}),
    ],
    ids=str,
)
def test_the_audit_is_unbiased(kind, options):
    tensors = peaked(11, 2, N)
    results = [attended(tensors, kind, seed, **options) for seed in range(60)]
    true = truth(results[0], kind)
    rows, kept, variance, freedom, audited = torch.stack([r.audit.double() for r in results]).unbind(-1)
    means, errors = kept / rows, variance.sqrt() / rows
    assert bool((audited[:, :-1] == 2 * audited_rows(N)).all())
    assert bool((freedom == audited[:, :1] - 2).all())
    assert torch.equal(audited[:, -1], audited[:, :-1].sum(1))
    of_mean = means.std(0) / len(results) ** 0.5
    assert bool(((means.mean(0) - true).abs() < 4 * of_mean).all()), (means.mean(0), true, of_mean)
    # What it says of its own spread is what its spread is.
    assert bool((errors.mean(0) / means.std(0) > 0.7).all())
    assert bool((errors.mean(0) / means.std(0) < 1.5).all())


def test_its_interval_holds_the_truth():
    held, count = 0, 0
    for case, kind in itertools.product(range(9), ("plain", "padded", "packed", "sliding")):
        tensors = peaked(100 + case, 2, N, Hq=(2, 4, 6)[case % 3])
        result = attended(tensors, kind, seed=case)
        counts = MassCounts()
        counts.add_audit(result.audit, None)
        found, true = counts.summary(), truth(result, kind)
        lower, upper = (torch.tensor([*found[f"{edge}_by_head"], found[edge]]) for edge in ("lower", "upper"))
        held += int(((lower <= true) & (true <= upper)).sum())
        count += len(true)
    assert count == 36 * 5
    assert held / count >= 0.88, held / count  # 95 % is what it says


def test_a_draw_follows_its_seed_and_leaves_the_global_random_state_alone():
    tensors = peaked(6, 2, N)
    state = torch.get_rng_state()
    first, again, other = (attended(tensors, "plain", seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.audit, again.audit)
    assert not torch.equal(first.audit, other.audit)
    assert torch.equal(first.output, other.output)
    assert attended(tensors, "plain", -1).audit is None


def test_sequences_shorter_than_the_audit_and_empty_ones():
    query, key, value = (t[:, :, :3] for t in peaked(7, 2, 40))
    visible = causal_intervals(2, 3, 3, "cpu").clone()
    visible[1] = 0
    config = NCConfig(1.0, 0.0, prefill="block", dense_below=0)
    budget = config.row_budgets(visible, 3, 0)
    for seen, rows in ((visible, 3), (torch.zeros_like(visible), 0)):
        problem = problem_of(query, key, value, seen, budget, origin=visible[..., 0], audit_seed=0)
        result = attend(problem, config.prefill, "torch")
        audit = dict(zip(AUDIT_COLUMNS, result.audit.T.tolist(), strict=True))
        assert audit["rows"] == [rows] * 4 + [4 * rows]
        assert audit["kept_mass"] == pytest.approx(audit["rows"])
        assert audit["variance"] == pytest.approx([0.0] * 5, abs=1e-8)


@pytest.mark.skipif(not has_numba(), reason="needs Numba")
def test_the_kernels_for_cpus_audit_as_pytorch_does():
    names = ("b128", "stride-1", "local-keys-beyond-the-budget", "packed-blocks", "softcap-per-head-budgets")
    cases = [*(random_case(seed, 400) for seed in range(24)), *(DESCRIBED[f"{name}-block"][0].case() for name in names)]
    estimated = 0
    for seed, case in enumerate(cases):
        if seed % 3 == 0 and not case.softcap:
            case.key[0, 0, case.key.shape[2] // 2, 0] = (torch.nan, torch.inf)[seed % 2]
        problem, selection = problem_of_case(case, audit_seed=seed), case.selection("block")
        ours, theirs = (selection.run(problem, backend) for backend in ("cpu", "torch"))
        assert_close(ours.audit, theirs.audit.double(), 1e-5)
        estimated += float(theirs.audit[-1, 1]) < float(theirs.audit[-1, 0])
    assert estimated > 12

"""The measurements behind docs/paper.md: their formulas, and that they measure the library."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reproduce_paper
import torch
from scipy import integrate, stats
from tiny_models import eager_weights, random_ids, tiny_model

from eval_tasks.errors import EvalError
from eval_tasks.paper import model, synthetic
from eval_tasks.paper.laws import Law, compare, equal_at, equal_in_mean
from nc_patch import sparse_attention


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_the_expected_share_is_the_integral_over_lognormal_weights(sigma: float) -> None:
    weight = lambda z: math.exp(sigma * z - sigma**2 / 2) * stats.norm.pdf(z)  # noqa: E731
    threshold = stats.norm.isf(synthetic.mass_share(sigma, 0.05))
    assert integrate.quad(weight, threshold, threshold + 20 + sigma)[0] == pytest.approx(0.95, abs=1e-8)


def test_laws_are_equal_where_they_are_said_to_be_and_spend_what_is_said_in_the_mean() -> None:
    laws, lengths = equal_at(37, 1000), [512, 2048, 8192]
    assert {law.mean(1000) for law in laws} == {37}
    assert len({law.mean(64_000) for law in laws}) == len(laws)
    fixed, *growing = (3 * law.mean(lengths) for law in equal_in_mean(100, lengths))
    assert fixed == 300
    assert len(growing) == 10
    assert all(300 - len(lengths) < spent <= 300 for spent in growing)


@pytest.mark.parametrize("sigma", [1.7, 4.0])
def test_losses_of_a_row_are_those_of_the_definition_and_the_library_attends_it_so(sigma: float) -> None:
    row, budgets = synthetic.draw(2048, 3), [0, 1, 17, 17, 300, 2047, 2048]
    assert (np.diff(row.z) <= 0).all()
    np.testing.assert_allclose(row.inputs @ row.direction, row.z, atol=1e-12)
    np.testing.assert_allclose(np.cov(row.inputs.T), np.eye(synthetic.CHANNELS), atol=0.15)
    options = {"sink_keys": 0, "recent_keys": 0, "tail": "drop", "return_stats": True}
    query, key = (torch.from_numpy(x).float().view(1, 1, -1, synthetic.CHANNELS) for x in (row.direction, row.inputs))
    weights = np.exp(sigma * row.z) / np.exp(sigma * row.z).sum()
    dense = weights @ row.inputs
    found = pd.DataFrame(synthetic.losses(row, sigma, budgets))
    for (_, losses), k in zip(found.iterrows(), budgets, strict=True):
        mass = weights[:k].sum()  # the highest scores come first
        kept = np.append(weights[:k] / mass if k else [], np.zeros(2048 - k))
        relative = np.linalg.norm(kept @ row.inputs - dense) / np.linalg.norm(dense)
        expected = {"kept_mass": mass, "weight_error": np.abs(kept - weights).max(), "relative_error.shared": relative}
        assert dict(losses) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        if k:
            attended = sparse_attention(sigma * query, key, key, alpha=k, scale=1.0, **options)
            np.testing.assert_allclose(attended.output.flatten().numpy(), kept @ row.inputs, atol=1e-5)
            assert float(attended.kept_mass) == pytest.approx(mass, abs=1e-5)


def test_measured_exponents_are_those_of_the_theory() -> None:
    found = synthetic.measure([1 << 8, 1 << 12, 1 << 16], 12, equal_at(64, 256), [1 << 12], 64)
    slope = {row["spread"]: row["entropy"][0] for row in found["exponents"]}
    assert {row["spread"]: row["mass 0.95"][0] for row in found["exponents"]}["sigma=1"] == pytest.approx(1, abs=0.02)
    assert slope["s=0.3"] == pytest.approx(0.91, abs=0.02)
    assert slope["s=0.5"] == pytest.approx(0.75, abs=0.03)
    assert slope["sigma=1"] == pytest.approx(1.0, abs=0.02)
    rows = [row for row in found["errors"] if row["spread"] == "s=0.707"]  # support n^0.5
    kept = {(row["n"], row["law"]): row["kept_mass"][0] for row in rows}
    assert kept[1 << 16, "n^0.75"] > kept[1 << 8, "n^0.75"] + 0.01
    assert kept[1 << 16, "n^0.25"] < kept[1 << 8, "n^0.25"] - 0.2
    assert kept[1 << 16, "log n"] < kept[1 << 8, "log n"] - 0.2


def test_mixed_lengths_are_averaged_and_compared_pair_by_pair() -> None:
    index = pd.MultiIndex.from_product([[16, 144], [0, 1], ["a", "b"]], names=["n", "seed", "law"])
    losses = pd.Series([1.0, 1.0, 2.0, 1.0, 3.0, 2.0, 4.0, 2.0], index)
    first, second = compare([Law("a", 8.0, 0.0), Law("b", 1.0, 0.5)], losses)
    assert (first["loss"], first["difference"]) == (2.5, 0.0)
    assert (second["loss"], second["difference"], second["mean_budget"]) == (1.5, -1.0, 8.0)
    assert second["by_length"] == [1.0, 2.0]
    assert second["low"] <= -1.0 <= second["high"]


def test_counts_and_losses_of_a_layer_are_those_of_its_exact_weights() -> None:
    tiny, ids = tiny_model("llama"), random_ids(1, 96)
    [captured], positions = model.capture(tiny, ids, [1]), model.positions_before(80, 3)
    assert positions.tolist() in ([74, 76, 79], [74, 77, 79])
    law = Law("2 n^0.5", 2.0, 0.5)
    counts, lost = model.count_keys(captured, positions), model.losses(captured, positions, [law]).loc[law.name]
    every = eager_weights(tiny, ids)[1][0]
    value = captured.value[0].double().repeat_interleave(2, 0)
    for row, position in enumerate(positions.tolist()):
        n, k, found = position + 1, int(law.mean(position + 1)), counts.xs(row, level="row")
        weights, order = every[:, position, :n].sort(descending=True)
        mass, sigma = weights.cumsum(-1), weights.log().std(-1, correction=0).numpy()
        assert found["mass 0.95"].tolist() == (1 + (mass < 0.95).sum(-1)).tolist()
        np.testing.assert_allclose(found["sigma"], sigma, rtol=1e-5)
        expected = np.maximum(1.0, n * synthetic.mass_share(sigma, 0.05))
        np.testing.assert_allclose(found["normal 0.95"], expected, rtol=1e-4)
        values = value.take_along_dim(order[..., None], 1)
        dense = torch.einsum("hn,hnd->hd", weights, values)
        difference = torch.einsum("hn,hnd->hd", weights[:, :k] / mass[:, k - 1 : k], values[:, :k]) - dense
        expected = [mass[:, k - 1].mean(), difference.abs().max(), difference.norm() / dense.norm()]
        assert lost.loc[row].tolist() == pytest.approx([float(x) for x in expected], rel=1e-4, abs=1e-6)


def test_what_plain_causal_attention_cannot_stand_for_is_not_captured() -> None:
    for family, what in {"mistral": "a window", "gemma2": "a soft-cap", "gpt_oss": "sinks"}.items():
        with pytest.raises(EvalError, match=f"layer 1 has {what}"):
            model.capture(tiny_model(family), random_ids(1, 32), [1])


def test_a_model_is_measured_sample_by_sample() -> None:
    laws, lengths, samples = equal_at(8, 64), [32, 64], [random_ids(1, 64) for _ in range(2)]
    found = model.measure(tiny_model("llama"), samples, [0, 2], lengths, laws, 8, rows=3)
    assert len(found["heads"]) == 2 * 4
    assert len(found["errors"]) == len(laws) * len(lengths)
    assert len({tuple(row["relative_error"]) for row in found["errors"] if row["n"] == 64}) == 1  # all equal there
    # The laws keep 8 of 64 keys, so the fixed one loses more of 64 than of 32.
    small, large = (row["relative_error"][0] for row in found["errors"] if row["law"] == "fixed")
    assert small < large
    [slope] = [row["relative_error"][0] for row in found["slopes"] if row["law"] == "fixed"]
    assert slope == pytest.approx(math.log2(large / small), abs=0.05)
    assert [row["C"] for row in found["mixed"]["rows"]["dropped_mass"]] == [step / 10 for step in range(11)]


def test_the_quick_run_writes_records_and_pictures(tmp_path: Path) -> None:
    reproduce_paper.main(["--quick", "--parts", "synthetic", "figures", "--threads", "1", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "synthetic.json").read_text(encoding="utf-8"))
    assert {"command", "commit", "versions", "hardware", "laws", "exponents", "mixed"} <= record.keys()
    assert len(record["errors"]) == len(synthetic.SPREADS) * 3 * 7
    assert all(x == float(f"{x:.5g}") for row in record["errors"] for x in row["kept_mass"])
    for name in ("bounded", "growing"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")

"""The measurements behind docs/paper.md: their formulas, and that they measure the library."""

import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from operations import reference_attention
from scipy import integrate, stats
from tiny_models import random_ids, tiny_model

from eval_tasks.capture import Captured, capture
from eval_tasks.paper import mixed, model, synthetic, theory
from eval_tasks.paper.estimates import estimate, exponents, geometric
from eval_tasks.paper.laws import DENSE, Law, equal_at, equal_in_mean

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce_paper", ROOT / "scripts" / "reproduce_paper.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("epsilon", [0.3, 0.05])
def test_mass_share_is_where_the_lognormal_integral_reaches_the_mass(sigma: float, epsilon: float) -> None:
    share = theory.mass_share(sigma, epsilon)
    threshold = stats.norm.isf(share)
    weight = lambda z: math.exp(sigma * z - sigma**2 / 2) * stats.norm.pdf(z)  # noqa: E731
    held, _ = integrate.quad(weight, threshold, threshold + 20 + sigma)
    assert held == pytest.approx(1 - epsilon, abs=1e-8)
    assert theory.kept_mass(1000, 1000 * share, sigma) == pytest.approx(1 - epsilon, abs=1e-12)


def test_kept_mass_of_all_keys_is_one() -> None:
    assert theory.kept_mass(7, 7, 2.0) == 1.0


def test_entropy_support_is_the_lognormal_one() -> None:
    n, sigma = 1 << 12, 1.3
    density = lambda z: math.exp(sigma * z - sigma**2 / 2) * stats.norm.pdf(z)  # noqa: E731
    # H = -sum p ln p with p = exp(sigma z - sigma²/2) / n.
    entropy, _ = integrate.quad(lambda z: density(z) * (math.log(n) + sigma**2 / 2 - sigma * z), -15, 15)
    assert theory.entropy_support(n, sigma) == pytest.approx(math.exp(entropy), rel=1e-6)
    assert theory.entropy_support(n, 40.0) == 1.0


@pytest.mark.parametrize("s", [0.0, 0.5, 0.9])
def test_support_exponent_is_the_slope_of_the_entropy_support(s: float) -> None:
    lengths = [1 << 10, 1 << 20]
    supports = [theory.entropy_support(n, theory.growing_spread(n, s)) for n in lengths]
    slope = math.log(supports[1] / supports[0]) / math.log(lengths[1] / lengths[0])
    assert slope == pytest.approx(theory.support_exponent(s), abs=1e-12)


def test_frozen_rows_have_exponent_zero_and_end_at_the_crossover_length() -> None:
    assert theory.support_exponent(1.3) == 0.0
    n = theory.crossover_length(3.0)
    assert theory.growing_spread(round(n), 1.0) == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize(("keys", "length"), [(64, 1024), (37, 1000)])
def test_laws_are_equal_where_they_are_said_to_be(keys: int, length: int) -> None:
    laws = equal_at(keys, length)
    assert {law.budget(length) for law in laws} == {keys}
    assert len({law.budget(64 * length) for law in laws}) == len(laws)


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
def test_laws_of_equal_mean_cost_spend_it_and_no_more(exponent: float) -> None:
    lengths = [512, 2048, 8192]
    law = equal_in_mean(100, lengths, exponent)
    spent = sum(law.budget(n) for n in lengths)
    assert 300 - len(lengths) < spent <= 300
    if exponent == 0.0:
        assert spent == 300


def test_a_mean_cost_above_the_shortest_length_is_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and the shortest length 64, got 65"):
        equal_in_mean(65, [64, 128], 0.5)


def naive_losses(row: synthetic.Row, sigma: float, k: int) -> dict[str, float]:
    """The definitions, spelled out over whole rows of weights."""
    weights = np.exp(sigma * row.z) / np.exp(sigma * row.z).sum()
    kept = np.zeros_like(weights)
    top = np.argsort(-row.z, kind="stable")[:k]
    kept[top] = weights[top] / weights[top].sum() if k else 0.0
    found = {"kept_mass": weights[top].sum(), "weight_error": np.abs(kept - weights).max()}
    for name, values in (("independent", row.values), ("shared", row.inputs())):
        difference = kept @ values - weights @ values
        found[f"output_error.{name}"] = np.abs(difference).max()
        found[f"relative_error.{name}"] = np.linalg.norm(difference) / np.linalg.norm(weights @ values)
    return found


def test_losses_of_a_row_are_those_of_the_definition() -> None:
    row, budgets = synthetic.draw(300, 3), [0, 1, 17, 17, 299, 300]
    found = synthetic.losses(row, 1.7, budgets)
    for place, k in enumerate(budgets):
        for name, expected in naive_losses(row, 1.7, k).items():
            assert found[name][place] == pytest.approx(expected, rel=1e-9, abs=1e-12), (name, k)


def test_the_inputs_of_a_row_have_its_scores_and_unit_covariance() -> None:
    row = synthetic.draw(20_000, 0)
    inputs = row.inputs()
    np.testing.assert_allclose(inputs @ row.direction, row.z, atol=1e-12)
    np.testing.assert_allclose(np.cov(inputs.T), np.eye(synthetic.CHANNELS), atol=0.05)
    assert abs(np.corrcoef(row.values @ row.direction, row.z)[0, 1]) < 0.03


@pytest.mark.parametrize("law", equal_at(16, 128), ids=lambda law: law.name)
@pytest.mark.parametrize("sigma", [1.0, 4.0])
def test_the_library_attends_a_row_as_the_float64_sums_do(law: Law, sigma: float) -> None:
    assert max(synthetic.library_difference(2048, 5, sigma, law).values()) < 1e-5


def test_supports_are_counted_from_the_largest_weight_down() -> None:
    row = synthetic.Row(np.log([8.0, 4.0, 2.0, 1.0, 1.0]), np.zeros((5, synthetic.CHANNELS)), np.zeros(1))
    found = synthetic.supports(row, 1.0)  # weights 1/2, 1/4, 1/8, 1/16, 1/16
    assert (found["mass 0.8"], found["mass 0.95"]) == (3, 5)
    assert found["entropy"] == pytest.approx(2**1.875)


def test_measured_exponents_are_those_of_the_theory() -> None:
    found = synthetic.measure([1 << 8, 1 << 12, 1 << 16], range(12), equal_at(64, 256), [])
    slope = {row["spread"]: row["entropy"][0] for row in found["exponents"]}
    assert slope["s=0.3"] == pytest.approx(theory.support_exponent(0.3), abs=0.02)
    assert slope["s=0.5"] == pytest.approx(theory.support_exponent(0.5), abs=0.03)
    assert slope["sigma=1"] == pytest.approx(1.0, abs=0.02)
    kept = {
        (row["n"], row["law"]): row["kept_mass"][0]
        for row in found["errors"]
        if row["spread"] == "s=0.707"  # support n^0.5
    }
    assert kept[1 << 16, "n^0.75"] > kept[1 << 8, "n^0.75"] + 0.01
    assert kept[1 << 16, "n^0.25"] < kept[1 << 8, "n^0.25"] - 0.2
    assert kept[1 << 16, "log n"] < kept[1 << 8, "log n"] - 0.2


def test_mixed_lengths_are_averaged_and_compared_pair_by_pair() -> None:
    fixed, growing = Law("a", 8.0, 0.0), Law("b", 1.0, 0.5)
    lengths = [16, 144]
    losses = {"a": np.array([[1.0, 2.0], [3.0, 4.0]]), "b": np.array([[1.0, 1.0], [2.0, 2.0]])}
    first, second = mixed.compare([fixed, growing], lengths, losses)
    assert (first["loss"], first["difference"]) == (2.5, 0.0)
    assert (second["loss"], second["difference"], second["mean_budget"]) == (1.5, -1.0, 8.0)
    assert second["by_length"] == [1.0, 2.0]
    assert second["low"] <= -1.0 <= second["high"]


def test_estimates_are_student_intervals() -> None:
    mean, low, high = estimate([1.0, 2.0, 3.0])
    half = stats.t.ppf(0.975, 2) * 1.0 / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((2.0, 2.0 - half, 2.0 + half))
    assert estimate([4.0]) == (4.0, None, None)
    assert geometric([2.0, 8.0])[0] == pytest.approx(4.0)
    np.testing.assert_allclose(
        exponents([10, 100, 1000], np.array([[1.0, 3.0], [10.0, 3.0], [100.0, 3.0]])), [1, 0], atol=1e-12
    )


def captured_layer() -> Captured:
    return capture(tiny_model("llama"), random_ids(1, 96), [1])[0]


def test_capture_hands_out_what_a_layer_attends_and_leaves_the_model_as_it_was() -> None:
    tiny, ids = tiny_model("llama"), random_ids(1, 24)
    before = tiny.config._attn_implementation
    with torch.inference_mode():
        expected = tiny(ids, output_hidden_states=True).hidden_states
    layers = capture(tiny, ids, [2, 0])
    assert tiny.config._attn_implementation == before
    for place, captured in zip((2, 0), layers, strict=True):
        layer = tiny.model.layers[place]
        with torch.inference_mode():
            values = layer.self_attn.v_proj(layer.input_layernorm(expected[place]))
        torch.testing.assert_close(captured.value, values.view(1, 24, 2, 16).transpose(1, 2))
        assert captured.query.shape == (1, 4, 24, 16)
        assert captured.scale == pytest.approx(16**-0.5)


def test_capture_refuses_layers_that_the_model_lacks() -> None:
    with pytest.raises(ValueError, match=r"layers \[7\] was not called"):
        capture(tiny_model("llama"), random_ids(1, 8), [0, 7])


def test_counts_of_a_layer_are_those_of_its_exact_weights() -> None:
    captured, positions = captured_layer(), model.positions_before(80, 3)
    assert positions.tolist() == [74, 76, 79] or positions.tolist() == [74, 77, 79]
    found = model.count_keys(captured, positions)
    for head in range(4):
        for row, position in enumerate(positions.tolist()):
            keys = captured.key[0, head // 2, : position + 1].double()
            scores = captured.scale * keys @ captured.query[0, head, position].double()
            weights = torch.softmax(scores, 0).sort(descending=True).values
            count = next(k for k in range(1, position + 2) if weights[:k].sum() >= 0.8)
            assert found["mass 0.8"][head, row] == count
            assert found["sigma"][head, row] == pytest.approx(float(scores.std(correction=0)))
            assert found["entropy"][head, row] == pytest.approx(float((-weights * weights.log()).sum().exp()))
            expected = max(1.0, (position + 1) * theory.mass_share(float(scores.std(correction=0)), 0.2))
            assert found["normal 0.8"][head, row] == pytest.approx(expected)


def test_losses_of_a_layer_are_those_of_the_reference() -> None:
    captured, positions, law = captured_layer(), model.positions_before(90, 4), Law("2 n^0.5", 2.0, 0.5)
    found = model.losses(captured, positions, [law, DENSE])
    end = positions.int() + 1
    budget = torch.tensor([law.budget(int(n)) for n in end], dtype=torch.int32).view(1, 1, -1)
    query, key, value, scale = captured
    common = {"visible": torch.stack((torch.zeros_like(end), end), -1)[None], "scale": scale}
    sparse, dense = (
        reference_attention(query[:, :, positions], key, value, budget=budget, selection=selection, **common)
        for selection in ("topk", "dense")
    )
    difference = (sparse.output - dense.output)[0].transpose(0, 1).flatten(1)
    relative = difference.norm(dim=-1) / dense.output[0].transpose(0, 1).flatten(1).norm(dim=-1)
    np.testing.assert_allclose(found[law.name]["relative_error"], relative, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[law.name]["output_error"], difference.abs().amax(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[law.name]["kept_mass"], sparse.kept_mass[0].mean(0), rtol=1e-5)
    assert found["dense"]["relative_error"].max() < 1e-6


def test_a_model_is_measured_sample_by_sample() -> None:
    laws, lengths = equal_at(8, 64), [32, 64]
    of_mean = mixed.laws_of_mean(8, lengths)
    samples = [random_ids(1, 64) for _ in range(2)]
    found = model.measure(tiny_model("llama"), samples, [0, 2], lengths, laws, of_mean, rows=3)
    assert len(found["heads"]) == 2 * 4
    assert len(found["errors"]) == len(laws) * len(lengths)
    assert len({tuple(row["relative_error"]) for row in found["errors"] if row["n"] == 64}) == 1  # all equal there
    assert found["documents"] == [0] * 6 + [1] * 6
    fixed = [row for row in found["errors"] if row["law"] == "fixed"]
    slopes = next(row for row in found["slopes"] if row["law"] == "fixed")
    assert slopes.keys() == {"law", "relative_error", "output_error", "dropped_mass"}
    # The laws keep 8 of 64 keys, so the fixed one loses more of 64 than of 32.
    assert fixed[0]["relative_error"][0] < fixed[1]["relative_error"][0]
    assert slopes["relative_error"][0] > 0
    compared = mixed.compare(
        of_mean, lengths, {law: x["relative_error"] for law, x in found["rows"].items()}, found["documents"]
    )
    assert [row["C"] for row in compared] == list(mixed.EXPONENTS)


def test_the_quick_run_writes_records_and_pictures(script: ModuleType, tmp_path: Path) -> None:
    script.main(["--quick", "--parts", "synthetic", "figures", "--threads", "1", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "synthetic.json").read_text(encoding="utf-8"))
    assert {"command", "commit", "versions", "hardware", "errors", "exponents", "mixed"} <= record.keys()
    assert max(row["shared"] for row in record["library_differences"]) < 1e-4
    assert len(record["errors"]) == len(synthetic.SPREADS) * 3 * 7
    for name in ("bounded", "growing", "exponents"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_without_measurements_are_refused(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="measure first"):
        script.main(["--parts", "figures", "--out", str(tmp_path)])


def test_written_records_read_back_rounded(script: ModuleType, tmp_path: Path) -> None:
    record = {"a": [{"b": [1.23456789, None], "c": {"d": []}}, {"b": []}], "e": 2, "f": [], "g": {"h": [[1, 2], []]}}
    script.write(tmp_path / "x.json", record)
    expected = {"a": [{"b": [1.2346, None], "c": {"d": []}}, {"b": []}], "e": 2, "f": [], "g": {"h": [[1, 2], []]}}
    assert json.loads((tmp_path / "x.json").read_text()) == expected


def test_the_page_shows_pictures_that_are_there() -> None:
    page = ROOT / "docs" / "paper.md"
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert len(pictures) >= 5
    assert all((page.parent / picture).is_file() for picture in pictures)

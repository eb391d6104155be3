"""Attention fidelity: kept mass and output error of layers and heads, against weights computed in float64."""

import csv
import json

import pytest
import torch
from tiny_models import FAMILIES, random_ids, tiny_model
from tiny_sweep import save_tiny_model, tiny_text

from eval_tasks.capture import capture, receive
from eval_tasks.errors import EvalError
from eval_tasks.fidelity import ROWS, fidelity
from eval_tasks.matching import Budgets
from eval_tasks.models import attention_of
from nc_patch import NCConfig
from nc_patch.cli import main

BUDGETS = Budgets(2.0, 0.5, 128)


def test_figures_are_those_of_the_weights_in_float64():
    model, ids = tiny_model("llama"), random_ids(1, 192)
    [row] = [
        row for row in fidelity(model, ids, ["nc-topk"], BUDGETS, [128, 192]) if (row.layer, row.length) == (1, 128)
    ]
    received = capture(model, ids, [1])[0]
    query = received.query[:, :, 128 - ROWS : 128].double()
    key, value = (t[:, :, :128].double().repeat_interleave(2, 1) for t in (received.key, received.value))
    n = torch.arange(128 - ROWS + 1, 129)
    scores = (query @ key.transpose(-1, -2) * received.scale).masked_fill(torch.arange(128) >= n[:, None], -torch.inf)
    weights = torch.softmax(scores, -1)
    config = NCConfig(2.0, 0.5, selection="topk", tail="drop")
    forced = (torch.arange(128) < config.prefill.sink_keys) | (torch.arange(128) == n[:, None] - 1)
    best = scores.masked_fill(forced, torch.inf).argsort(-1, descending=True).argsort(-1)
    attended = weights * (best < config.budget(n)[:, None])
    output, dense = attended / attended.sum(-1, keepdim=True) @ value, weights @ value
    assert row.kept_mass == pytest.approx(attended.sum(-1).mean((0, 2)).tolist(), rel=1e-4)
    expected = ((output - dense).norm(dim=-1) / dense.norm(dim=-1)).mean((0, 2))
    assert row.output_error == pytest.approx(expected.tolist(), rel=1e-4)
    assert row.attended_fraction == pytest.approx(float((config.budget(n) / n).mean()))


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_soft_caps_and_sinks_are_those_of_the_model(family):
    model, ids, config = tiny_model(family), random_ids(1, 128), NCConfig(2.0, 0.5, selection="topk", tail="drop")
    implementation = attention_of(model)
    rows = {row.layer: row for row in fidelity(model, ids, ["nc-topk"], BUDGETS, [128])}
    assert attention_of(model) == implementation
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        by_layer = model(ids, output_attentions=True).attentions
    for layer, received in enumerate(receive(model, ids, [0, 1, 2])):
        weights = by_layer[layer][:, :, -ROWS:].double()
        value = received.value.double().repeat_interleave(2, 1)
        seen = weights > 0
        n = seen.sum(-1, keepdim=True)
        number = seen.cumsum(-1)
        budget = config.budget(n[0, 0, :, 0])[:, None]
        forced = seen & ((number <= config.prefill.sink_keys) | (number == n))
        order = weights.masked_fill(forced, torch.inf).masked_fill(~seen, -1.0)
        attended = weights * (order.argsort(-1, descending=True).argsort(-1) < budget)
        sink = 1 - weights.sum(-1, keepdim=True)  # what a learned sink takes
        dense, sparse = weights @ value, attended @ value / (attended.sum(-1, keepdim=True) + sink)
        kept = (attended.sum(-1) / weights.sum(-1)).mean((0, 2))
        error = ((sparse - dense).norm(dim=-1) / dense.norm(dim=-1)).mean((0, 2))
        assert rows[layer].kept_mass == pytest.approx(kept.tolist(), rel=1e-4)
        assert rows[layer].output_error == pytest.approx(error.tolist(), rel=1e-3, abs=1e-5)
        assert rows[layer].attended_fraction == pytest.approx(float((budget / n[0, 0]).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "message"),
    [("mistral", "layer 1 has a window"), ("gemma2", "has a soft-cap"), ("gpt_oss", "layer 1 has sinks")],
)
def test_what_plain_causal_attention_cannot_stand_for_is_not_captured(family, message):
    with pytest.raises(EvalError, match=message):
        capture(tiny_model(family), random_ids(1, 32), [1])


@pytest.mark.parametrize("method", ["window", "streaming", "log-topk", "block"])
def test_a_larger_budget_keeps_more_and_errs_less(method):
    model, ids = tiny_model("llama"), random_ids(1, 192)
    small, large = (
        list(fidelity(model, ids, [method], Budgets(alpha, 0.5, 192, block_size=16), [192])) for alpha in (2.0, 8.0)
    )
    assert len(small) == len(large) == 3
    for a, b in zip(small, large, strict=True):
        assert sum(b.kept_mass) > sum(a.kept_mass)
        assert sum(b.output_error) < sum(a.output_error)
        assert b.attended_fraction > a.attended_fraction


def test_what_has_no_sparse_attention_and_lengths_beyond_the_text_are_refused():
    model, ids = tiny_model("llama"), random_ids(1, 128)
    [mean], [drop] = (
        list(fidelity(model, ids, [name], BUDGETS, [128], layers=[1])) for name in ("nc-topk-mean", "nc-topk")
    )
    assert mean.kept_mass == pytest.approx(drop.kept_mass)  # the means of what is left out are no keys
    assert mean.output_error != drop.output_error
    for method in ("dense", "random", "kvpress:SnapKVPress"):
        with pytest.raises(EvalError, match="no sparse attention of this package"):
            list(fidelity(model, ids, [method], BUDGETS, [128]))
    for length in (32, 256):
        with pytest.raises(EvalError, match="between 64 and the 128 tokens"):
            list(fidelity(model, ids, ["nc-topk"], BUDGETS, [length]))


def test_the_command_writes_figures_table_and_picture(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny_text(2000))
    arguments = ["fidelity", "--model", str(model), "--text", str(tmp_path / "text.txt"), "--lengths", "64", "128"]
    chosen = ["--methods", "nc-topk", "block", "--device", "cpu"]
    assert main([*arguments, *chosen, "--out", str(tmp_path / "out")]) == 0
    assert "α·n^C top-k" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert len(record["rows"]) == 2 * 2 * 2 * 3
    with (tmp_path / "out" / "fidelity.csv").open() as file:
        assert {(row["method"], row["length"]) for row in csv.DictReader(file)} == {
            (method, length) for method in ("nc-topk", "block") for length in ("64", "128")
        }
    assert (tmp_path / "out" / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--methods", "nc-top", "--out", str(tmp_path / "out")]) == 2
    assert "unknown method 'nc-top'" in capsys.readouterr().err

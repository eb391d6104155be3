"""Attention fidelity: kept mass and output error of layers and heads, against weights computed in float64."""

import json

import pandas as pd
import pytest
import torch
from tiny_models import FAMILIES, eager_weights, random_ids, tiny_model
from tiny_sweep import tiny_files

from eval_tasks.capture import receive
from eval_tasks.fidelity_command import ROWS, configs_of, fidelity
from eval_tasks.methods import Budgets
from eval_tasks.models import attention_of
from nc_patch import NCConfig
from nc_patch.cli import main

BUDGETS = Budgets(2.0, 0.5, 128)


@pytest.mark.parametrize("length", [128, 192])
@pytest.mark.parametrize("family", FAMILIES)
def test_figures_are_those_of_the_models_own_weights_in_float64(family, length):
    model, ids, config = tiny_model(family), random_ids(1, 192), NCConfig(2.0, 0.5, selection="topk", tail="drop")
    implementation = attention_of(model)
    rows = [
        row for row in fidelity(model, ids, configs_of(["nc-topk"], BUDGETS, [128, 192])) if row["length"] == length
    ]
    assert attention_of(model) == implementation
    by_layer = eager_weights(model, ids)
    for row, received in zip(rows, receive(model, ids, [0, 1, 2]), strict=True):
        weights = by_layer[row["layer"]][:, :, length - ROWS : length, :length]
        value = received.value[:, :, :length].double().repeat_interleave(2, 1)
        seen = weights > 0
        n, number = seen.sum(-1, keepdim=True), seen.cumsum(-1)
        budget = config.budget(n[0, 0, :, 0])[:, None]
        forced = seen & ((number <= config.prefill.sink_keys) | (number == n))
        order = weights.masked_fill(forced, torch.inf).masked_fill(~seen, -1.0)
        attended = weights * (order.argsort(-1, descending=True).argsort(-1) < budget)
        sink = 1 - weights.sum(-1, keepdim=True)  # what a learned sink takes
        dense, sparse = weights @ value, attended @ value / (attended.sum(-1, keepdim=True) + sink)
        kept = (attended.sum(-1) / weights.sum(-1)).mean((0, 2))
        error = ((sparse - dense).norm(dim=-1) / dense.norm(dim=-1)).mean((0, 2))
        assert row["kept_mass"] == pytest.approx(kept.tolist(), rel=1e-4)
        assert row["output_error"] == pytest.approx(error.tolist(), rel=1e-3, abs=1e-5)
        assert row["attended_fraction"] == pytest.approx(float((budget / n[0, 0]).mean()), rel=1e-5)


@pytest.mark.parametrize("method", ["window", "streaming", "log-topk", "block"])
def test_a_larger_budget_keeps_more_and_errs_less(method):
    model, ids = tiny_model("llama"), random_ids(1, 192)
    both = (configs_of([method], Budgets(alpha, 0.5, 192), [192]) for alpha in (2.0, 8.0))
    small, large = (list(fidelity(model, ids, configs)) for configs in both)
    assert len(small) == len(large) == 3
    for a, b in zip(small, large, strict=True):
        assert sum(b["kept_mass"]) > sum(a["kept_mass"])
        assert sum(b["output_error"]) < sum(a["output_error"])
        assert b["attended_fraction"] > a["attended_fraction"]


def test_means_of_what_is_left_out_are_no_keys():
    model, ids = tiny_model("llama"), random_ids(1, 128)
    mean, drop, *_ = fidelity(model, ids, configs_of(["nc-topk-mean", "nc-topk"], BUDGETS, [128]))
    assert mean["kept_mass"] == pytest.approx(drop["kept_mass"])
    assert mean["output_error"] != drop["output_error"]


def test_the_command_writes_every_head_the_means_over_them_and_a_picture(tmp_path, capsys):
    out, chosen = tmp_path / "out", ["--lengths", "64", "128", "--methods", "nc-topk", "block", "--device", "cpu"]
    assert main(["fidelity", *tiny_files(tmp_path), "--out", str(out), *chosen]) == 0
    assert "α·n^C top-k" in capsys.readouterr().out
    rows = json.loads((out / "fidelity.json").read_text())["rows"]
    written = pd.read_csv(out / "fidelity.csv")
    assert len(rows) == 2 * len(written) == 2 * 2 * 2 * 3  # samples, methods, lengths, layers
    for line in written.itertuples():
        own = [r for r in rows if (r["method"], r["length"], r["layer"]) == (line.method, line.length, line.layer)]
        errors = torch.tensor([row["output_error"] for row in own]).mean(0)
        assert line.output_error == pytest.approx(float(errors.mean()), rel=1e-4)
        assert line.worst_head_error == pytest.approx(float(errors.max()), rel=1e-4)
        assert line.kept_mass == pytest.approx(float(torch.tensor([r["kept_mass"] for r in own]).mean()), rel=1e-4)
    assert (out / "fidelity.png").read_bytes().startswith(b"\x89PNG")

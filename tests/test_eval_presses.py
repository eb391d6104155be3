"""Presses of kvpress as peers, tried with a stand-in of that package: one press that keeps the most recent keys."""

import contextlib
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from tiny_models import tiny_model
from tiny_sweep import sweep_arguments, tiny_text, tiny_tokenizer

from eval_tasks.errors import EvalError
from eval_tasks.measure import measure
from eval_tasks.presses import Press, find_press
from eval_tasks.store import read_rows
from eval_tasks.tasks import TASKS, Layout, tokenise
from nc_patch.cli import main


@dataclass
class RecentPress:
    """Keeps the last keys, by hooks on the attention modules around a prefill, as the base class of kvpress does."""

    compression_ratio: float = 0.0

    @contextlib.contextmanager
    def __call__(self, model):
        def compress(module, arguments, kwargs, output):
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            kept = round(layer.keys.shape[2] * (1 - self.compression_ratio))
            layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]

        hooks = [layer.self_attn.register_forward_hook(compress, with_kwargs=True) for layer in model.model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@pytest.fixture
def kvpress(monkeypatch):
    package = types.ModuleType("kvpress")
    package.RecentPress = RecentPress
    package.BasePress = type("BasePress", (), {})
    package.__spec__ = types.SimpleNamespace(name="kvpress")
    monkeypatch.setitem(sys.modules, "kvpress", package)


@pytest.fixture
def sample():
    return TASKS["perplexity"].build(tokenise(tiny_tokenizer(), tiny_text(2000)), 0, 96, Layout((96,), 1, 16, 12, 0))


def test_a_press_that_keeps_everything_is_dense_and_counts_every_key(kvpress, sample):
    model = tiny_model("llama")
    dense = measure(model, None, sample, "question")
    kept = measure(model, Press("RecentPress", 80), sample, "question")
    assert kept.loss_sum == pytest.approx(dense.loss_sum, rel=1e-6)
    assert kept.attended_fraction == 1.0
    assert kept.tail_mean_keys == dense.tail_mean_keys


def test_what_a_press_drops_is_seen_by_no_later_token(kvpress, sample):
    """Keeping the last 30 of 80 keys is attention under a mask that hides the first 50, in the scored rows alone."""
    model = tiny_model("llama")
    measured = measure(model, Press("RecentPress", 30), sample, "question")
    ids = torch.from_numpy(sample.ids)[None, :-1]
    seen = torch.ones(96, 96, dtype=torch.bool).tril()
    seen[80:, :50] = False
    with torch.inference_mode():
        mask = torch.zeros(1, 1, 96, 96).masked_fill(~seen, -torch.inf)
        logits = model(input_ids=ids, attention_mask=mask).logits[0, -16:].double()
    expected = -torch.log_softmax(logits, -1)[torch.arange(16), torch.from_numpy(sample.ids)[-16:]].sum()
    assert measured.loss_sum == pytest.approx(float(expected), rel=1e-5)
    assert measured.tail_mean_keys == pytest.approx(30 + 8.5)
    assert measured.attended_fraction == pytest.approx((30 + 8.5) / (80 + 8.5))


def test_presses_stand_beside_other_methods_in_one_table(kvpress, tmp_path):
    methods = ("--methods", "dense", "nc-topk", "kvpress:RecentPress", "--tasks", "recall", "--phase", "question")
    assert main(sweep_arguments(tmp_path, tmp_path / "out", *methods)) == 0
    assert "kvpress:RecentPress" in (tmp_path / "out" / "summary.csv").read_text()
    assert "Recent (kvpress)" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    budgets = {(row["length"], row["method"]): row["budget"] for row in read_rows(tmp_path / "out")}
    assert budgets[96, "kvpress:RecentPress"] == budgets[96, "nc-topk"]


def test_presses_are_not_compared_with_sparse_prefills(kvpress, tmp_path, capsys):
    arguments = sweep_arguments(tmp_path, tmp_path / "out", "--methods", "dense", "kvpress:RecentPress")
    assert main(arguments) == 2
    assert "--phase question" in capsys.readouterr().err


def test_unknown_presses_and_those_without_a_ratio_are_refused(kvpress):
    for name in ("BasePress", "NoSuchPress"):
        with pytest.raises(EvalError, match="it has RecentPress"):
            find_press(name)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(EvalError, match="pip install kvpress"):
        find_press("SnapKVPress")


def test_a_package_that_cannot_be_imported_says_why(monkeypatch, tmp_path):
    package = tmp_path / "kvpress"
    package.mkdir()
    (package / "__init__.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kvpress", raising=False)
    with pytest.raises(EvalError, match="cannot be imported: No module named 'a_package_that_is_not_there'"):
        find_press("SnapKVPress")

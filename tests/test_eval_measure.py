"""One measurement: losses, realised budgets, phases, answers and presses of kvpress."""

import contextlib
import dataclasses
import math
import sys
import types

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tiny_sweep import sweep_arguments, tiny_text, tiny_tokenizer

from eval_tasks.errors import EvalError
from eval_tasks.measure import QUESTION_TOKENS, SPARSE_IN, Press, answer, end_tokens, measure
from eval_tasks.methods import METHODS, Budgets
from eval_tasks.models import load_model
from eval_tasks.store import read_rows, read_run
from eval_tasks.synthetic import GENERATORS, synthesize
from eval_tasks.synthetic.sample import tokens_of
from eval_tasks.tasks import TASKS, Layout, tokenise
from nc_patch import NCConfig, patched
from nc_patch.cli import main

BUDGETS = Budgets(2.0, 0.5, 48)
TOPK = NCConfig(2.0, 0.5, selection="topk", dense_below=0)


@pytest.fixture(scope="module")
def sample():
    return TASKS["perplexity"].build(tokenise(tiny_tokenizer(), tiny_text(2000)), 0, 96, Layout((96,), 1, 16, 12, 0))


def loss_under(model, sample, hidden_before=0):
    """Σ −ln p of the 16 scored tokens, whose rows do not see the first keys; from the model's own forward pass."""
    ids = torch.from_numpy(sample.ids)
    seen = torch.ones(96, 96, dtype=torch.bool).tril()
    seen[80:, :hidden_before] = False
    with torch.inference_mode():
        mask = torch.zeros(1, 1, 96, 96).masked_fill(~seen, -torch.inf)
        logits = model(ids[None, :-1], attention_mask=mask).logits[0].double()
    return float(-torch.log_softmax(logits, -1)[torch.arange(96), ids[1:]][-16:].sum())


def attended(config, phase, context, tail, end):
    """What a row says of the keys of ``end`` queries, with a dense prefill of the first ``context`` or without.

    Those from ``tail`` on are scored. ``config`` None is dense, as is what a phase does not name.
    """
    of_phase = {"all": range(1, end + 1), "prefill": range(1, context + 1)}.get(phase, range(context + 1, end + 1))
    found = {}
    for name, queries, law in (("", of_phase, config), ("tail_", range(tail, end + 1), phase != "prefill" and config)):
        keys = [law.budget(n) if law else n for n in queries]
        found |= {f"{name}mean_keys": np.mean(keys), f"{name}attended_fraction": sum(keys) / sum(queries)}
    return found


def test_the_loss_is_that_of_the_scored_tokens_and_the_model_stays_unpatched(sample):
    model = tiny_model("llama")
    measured = measure(model, None, sample)
    assert (measured["tokens"], measured["bytes"]) == (16, 16 * len(" w00"))
    assert len(measured["token_losses"]) == 16
    assert sum(measured["token_losses"]) == pytest.approx(measured["loss_sum"], abs=1e-3)
    assert measure(model, TOPK, sample)["loss_sum"] != measured["loss_sum"]
    assert measure(model, None, sample)["loss_sum"] == measured["loss_sum"]
    sliding = measure(tiny_model("mistral"), None, sample)  # how many keys they see is left open
    assert (sliding["attended_fraction"], sliding["mean_keys"], sliding["tail_mean_keys"]) == (1.0, None, None)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("nc", "profile")])
def test_phases_attend_what_the_law_says_where_they_are_sparse_and_time_their_prefill_apart(sample, method):
    model, config, losses = tiny_model("llama"), METHODS[method].config(BUDGETS), {}
    for phase in SPARSE_IN:
        measured = measure(model, config, sample, phase)
        expected = attended(config, phase, 80, 81, 96)
        if method == "block":  # whole blocks, but where the scored tokens are dense
            expected = {name: keys for name, keys in expected.items() if phase == "prefill" and "tail" in name}
        assert {name: measured[name] for name in expected} == pytest.approx(expected)
        assert measured["ran_dense"] == {}
        assert 0 < measured.get("prefill_seconds", 1e-9) < measured["seconds"]
        assert ("prefill_seconds" in measured) == (phase != "all")
        losses[phase] = measured["loss_sum"]
    # A row scores the same whether it is read alone or with others.
    assert losses.pop("decode") == pytest.approx(losses["question"], rel=1e-5)
    generated = losses.pop("generate")
    if method != "block":  # whose queries choose together
        assert generated == pytest.approx(losses["all"], rel=1e-5)
    dense = measure(model, None, sample)["loss_sum"]
    assert method == "dense" or len({round(loss, 4) for loss in (dense, *losses.values())}) == 1 + len(losses)


@pytest.mark.parametrize("phase", SPARSE_IN)
@pytest.mark.parametrize("selection", [None, "topk", "window"])
def test_every_phase_of_all_keys_is_dense(sample, phase, selection):
    model, every = tiny_model("llama"), selection and NCConfig(1.0, 1.0, selection=selection, dense_below=0)
    assert measure(model, every, sample, phase)["loss_sum"] == pytest.approx(loss_under(model, sample), rel=1e-5)


def test_a_loss_that_is_no_number_is_an_error(sample):
    model = tiny_model("llama")
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(EvalError, match="NaN or Inf"):
        measure(model, None, sample)


# Answers to generated tasks


@pytest.fixture(scope="module")
def speaker(subword_model):
    """A model and its tokenizer."""
    loaded = load_model(subword_model, "float32", "cpu")
    return loaded.model, loaded.tokenizer


@pytest.fixture(scope="module")
def question(speaker):
    sample = synthesize(GENERATORS["niah_single_1"], speaker[1], 512, 0, 0, new_tokens=12)
    return dataclasses.replace(sample, answers=("needle",))


@pytest.mark.parametrize("config", [None, NCConfig(2.0, 0.5, dense_below=0), TOPK], ids=["dense", "default", "topk"])
def test_answers_are_those_of_generate(speaker, question, config):
    model, tokenizer = speaker
    ids = torch.tensor([tokens_of(tokenizer, question.prompt)])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    with contextlib.nullcontext() if config is None else patched(model, config=config):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    row = answer(*speaker, config, question)
    assert (row["said"], row["score"], row["depth"]) == (expected[:400], 0.0, question.depths[0])
    asked = dataclasses.replace(question, answers=(expected[2:6],))
    assert answer(*speaker, config, asked)["score"] == 1.0


def test_each_of_several_end_tokens_ends_an_answer(speaker, monkeypatch):
    model, tokenizer = speaker
    monkeypatch.setattr(model.generation_config, "eos_token_id", [5, 7])
    assert end_tokens(model, tokenizer) == {5, 7, tokenizer.eos_token_id}


@pytest.mark.parametrize("phase", SPARSE_IN)
def test_what_an_answer_attends_is_the_law_at_its_positions_and_its_tokens_are_timed_apart(speaker, question, phase):
    n, asked = question.prompt_tokens, QUESTION_TOKENS if phase == "question" else 1
    for config in (None, TOPK):
        row = answer(*speaker, config, question, phase)
        expected = attended(config, phase, n - asked, n, n + row["said_tokens"] - 1)
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        assert 0 < row.get("prefill_seconds", 1e-9) < row["first_token_seconds"] < row["seconds"]
        assert ("prefill_seconds" in row) == (phase != "all")
        assert config or row["said"] == answer(*speaker, None, question)["said"]


def test_a_sweep_asks_every_method_the_same_and_refuses_lengths_that_are_too_short(tmp_path, capsys, subword_model):
    arguments = ["eval", "--model", subword_model, "--device", "cpu", "--methods", "dense", "nc-topk", "--out"]
    asked = ["--tasks", "passkey", "--lengths", "512", "--samples", "2", "--answer-tokens", "4"]
    assert main([*arguments, str(tmp_path), *asked]) == 0
    rows = read_rows(tmp_path)
    same = {(r["sample"], tuple(r["expected"]), r["depth"], r["prompt_tokens"]) for r in rows}
    assert (len(rows), len(same)) == (4, 2)
    assert {row["said_tokens"] for row in rows} == {4}
    assert len({row["expected"][0] for row in rows}) == 2
    assert read_run(tmp_path)["identity"]["tasks"] == ["passkey"]
    assert main([*arguments, str(tmp_path / "b"), "--tasks", "niah_single_1", "--lengths", "64"]) == 2
    assert "length 64 is too short for the task niah_single_1" in capsys.readouterr().err


# Presses of kvpress, with a stand-in of that package


@dataclasses.dataclass
class RecentPress:
    """Keeps the last keys of a prefill, by a hook on the model; the base class of kvpress has one on each layer."""

    compression_ratio: float = 0.0

    @contextlib.contextmanager
    def __call__(self, model):
        def compress(module, arguments, output):
            for layer in output.past_key_values.layers:
                kept = round(layer.keys.shape[2] * (1 - self.compression_ratio))
                layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]

        with model.register_forward_hook(compress):
            yield


@pytest.fixture
def kvpress(monkeypatch):
    package = types.ModuleType("kvpress")
    package.RecentPress, package.BasePress = RecentPress, type("BasePress", (), {})
    package.__spec__ = types.SimpleNamespace(name="kvpress")
    monkeypatch.setitem(sys.modules, "kvpress", package)


@pytest.mark.parametrize("kept", [80, 30])
def test_what_a_press_drops_is_seen_by_no_scored_token(kvpress, sample, kept):
    model = tiny_model("llama")
    measured = measure(model, Press("RecentPress", kept), sample, "question")
    assert measured["loss_sum"] == pytest.approx(loss_under(model, sample, hidden_before=80 - kept), rel=1e-5)
    assert measured["tail_mean_keys"] == pytest.approx(kept + 8.5)
    assert measured["attended_fraction"] == pytest.approx((kept + 8.5) / (80 + 8.5))


def test_presses_stand_beside_other_methods_and_one_that_is_not_there_is_refused(kvpress, tmp_path, capsys):
    further = ["--methods", "nc-topk", "kvpress:RecentPress", "--tasks", "recall", "--phase", "question"]
    assert main(sweep_arguments(tmp_path, tmp_path / "out", *further)) == 0
    budgets = {(row["length"], row["method"]): row["budget"] for row in read_rows(tmp_path / "out")}
    assert budgets[96, "kvpress:RecentPress"] == budgets[96, "nc-topk"]
    further[2] = "kvpress:NoSuchPress"
    assert main(sweep_arguments(tmp_path, tmp_path / "none", *further)) == 2
    assert "it has RecentPress" in capsys.readouterr().err

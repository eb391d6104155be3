"""One measurement: losses, realised budgets, phases, answers and presses of kvpress."""

import contextlib
import dataclasses
import json
import math
import sys
import types
import weakref

import numpy as np
import pytest
import torch
from synthetic_tokenizers import tokenizer_of_kind
from tiny_models import tiny_model
from tiny_sweep import sweep_arguments, tiny_text, tiny_tokenizer

from eval_tasks import measure as measuring
from eval_tasks.answers import QUESTION_TOKENS, answer
from eval_tasks.errors import EvalError, MemoryRanOut
from eval_tasks.measure import SPARSE_IN, measure
from eval_tasks.methods import METHODS, Budgets
from eval_tasks.presses import Press, find_press
from eval_tasks.store import read_rows
from eval_tasks.synthetic import GENERATORS, synthesize
from eval_tasks.synthetic.fitting import tokens_of
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


def test_the_loss_is_that_of_the_scored_tokens_and_the_model_stays_unpatched(sample):
    model = tiny_model("llama")
    measured = measure(model, None, sample)
    assert measured["loss_sum"] == pytest.approx(loss_under(model, sample), rel=1e-5)
    assert (measured["tokens"], measured["bytes"]) == (16, 16 * len(" w00"))
    assert len(measured["token_losses"]) == 16
    assert sum(measured["token_losses"]) == pytest.approx(measured["loss_sum"], abs=1e-3)
    assert measure(model, TOPK, sample)["loss_sum"] != measured["loss_sum"]
    assert measure(model, None, sample)["loss_sum"] == measured["loss_sum"]
    sliding = measure(tiny_model("mistral"), None, sample)  # how many keys they see is left open
    assert (sliding["attended_fraction"], sliding["mean_keys"], sliding["tail_mean_keys"]) == (1.0, None, None)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("block", "nc", "profile")])
def test_realised_budgets_are_those_of_the_law(sample, method):
    config = METHODS[method].config(BUDGETS)
    measured = measure(tiny_model("llama"), config, sample)
    law = (lambda n: n) if config is None else config.budget
    budgets = [law(n) for n in range(1, 97)]
    assert measured["mean_keys"] == pytest.approx(sum(budgets) / 96)
    assert measured["tail_mean_keys"] == pytest.approx(sum(budgets[-16:]) / 16)
    assert measured["attended_fraction"] == pytest.approx(sum(budgets) / sum(range(1, 97)))
    assert measured["tail_attended_fraction"] == pytest.approx(sum(budgets[-16:]) / sum(range(81, 97)))
    assert measured["ran_dense"] == {}


@pytest.mark.parametrize("method", ["nc-topk", "nc-window", "block"])
def test_phases_are_sparse_where_they_say_and_time_their_prefill_apart(sample, method):
    model, attention = tiny_model("llama"), METHODS[method].config(BUDGETS)
    law = attention.budget
    dense = measure(model, None, sample)
    found = {phase: measure(model, attention, sample, phase) for phase in SPARSE_IN}
    assert len({round(m["loss_sum"], 6) for m in (dense, *found.values())}) >= 4
    assert found["prefill"]["tail_mean_keys"] == dense["tail_mean_keys"] == 88.5
    if method != "block":
        assert found["prefill"]["mean_keys"] == pytest.approx(sum(law(n) for n in range(1, 81)) / 80)
        scored = sum(law(n) for n in range(81, 97)) / 16
        for phase in ("question", "decode"):
            assert found[phase]["tail_mean_keys"] == found[phase]["mean_keys"] == pytest.approx(scored)
        # A row scores the same whether it is read alone or with others.
        assert found["decode"]["loss_sum"] == pytest.approx(found["question"]["loss_sum"], rel=1e-5)
    for phase, measured in found.items():
        assert 0 < measured.get("prefill_seconds", 1e-9) < measured["seconds"]
        assert ("prefill_seconds" in measured) == (phase != "all")


@pytest.mark.parametrize("phase", SPARSE_IN)
@pytest.mark.parametrize("selection", [None, "topk", "window"])
def test_every_phase_of_all_keys_is_dense(sample, phase, selection):
    model, every = tiny_model("llama"), selection and NCConfig(1.0, 1.0, selection=selection, dense_below=0)
    assert measure(model, every, sample, phase)["loss_sum"] == pytest.approx(loss_under(model, sample), rel=1e-5)


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), MemoryRanOut, "ran out at 96 tokens"),
        (RuntimeError("shapes do not fit"), RuntimeError, "shapes do not fit"),
    ],
)
def test_where_memory_ran_out_what_was_allocated_is_free_and_other_errors_are_themselves(
    sample, monkeypatch, raised, error, message
):
    held = []

    def greedy(model, ids, keep, cache=None):
        large = torch.zeros(8)
        held.append(weakref.ref(large))
        raise raised

    monkeypatch.setattr(measuring, "forward", greedy)
    with pytest.raises(error, match=message) as caught:
        measure(tiny_model("llama"), TOPK, sample)
    assert held[0]() is None or caught.type is RuntimeError


def test_a_loss_that_is_no_number_is_an_error(sample):
    model = tiny_model("llama")
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(EvalError, match="NaN or Inf"):
        measure(model, None, sample)


# Answers to generated tasks


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of_kind("byte_bpe")


@pytest.fixture(scope="module")
def speaker(tokenizer):
    return tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def question(tokenizer):
    sample = synthesize(GENERATORS["niah_single_1"], tokenizer, 512, 0, 0, new_tokens=12)
    return dataclasses.replace(sample, answers=("needle",))


@pytest.mark.parametrize("config", [None, NCConfig(2.0, 0.5, dense_below=0), TOPK], ids=["dense", "default", "topk"])
def test_answers_are_those_of_generate(speaker, tokenizer, question, config):
    ids = torch.tensor([tokens_of(tokenizer, question.prompt)])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    with contextlib.nullcontext() if config is None else patched(speaker, config=config):
        out = speaker.generate(ids, attention_mask=torch.ones_like(ids), **options)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    row = answer(speaker, tokenizer, config, question)
    assert (row["said"], row["score"], row["depth"]) == (expected[:400], 0.0, question.depths[0])
    asked = dataclasses.replace(question, answers=(expected[2:6],))
    assert answer(speaker, tokenizer, config, asked)["score"] == 1.0


@pytest.mark.parametrize("phase", SPARSE_IN)
def test_what_an_answer_attends_is_the_law_at_its_positions_and_its_tokens_are_timed_apart(
    speaker, tokenizer, question, phase
):
    row, dense = (answer(speaker, tokenizer, config, question, phase) for config in (TOPK, None))
    law = lambda first, last: np.mean([TOPK.budget(n) for n in range(first, last)])  # noqa: E731
    n = row["prompt_tokens"]
    end, last = n + row["said_tokens"], n + dense["said_tokens"]
    begin = {"question": n - QUESTION_TOKENS + 1, "decode": n}.get(phase, 1)
    assert row["mean_keys"] == pytest.approx(law(1, n) if phase == "prefill" else law(begin, end))
    assert row["tail_mean_keys"] == pytest.approx(np.mean(range(n, end)) if phase == "prefill" else law(n, end))
    assert dense["tail_mean_keys"] == pytest.approx(np.mean(range(n, last)))
    assert dense["mean_keys"] == pytest.approx(np.mean(range(begin, n if phase == "prefill" else last)))
    assert dense["said"] == answer(speaker, tokenizer, None, question)["said"]
    assert 0 < row.get("prefill_seconds", 1e-9) < row["first_token_seconds"] < row["seconds"]
    assert ("prefill_seconds" in row) == (phase != "all")


def test_a_sweep_asks_every_method_the_same_and_refuses_lengths_that_are_too_short(
    tmp_path, capsys, speaker, tokenizer
):
    speaker.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["eval", "--model", str(tmp_path / "model"), "--device", "cpu", "--methods", "dense", "nc-topk"]
    asked = ["--out", str(tmp_path / "out"), "--tasks", "passkey", "--lengths", "512", "640", "--samples", "2"]
    asked += ["--answer-tokens", "4"]
    assert main([*arguments, *asked]) == 0
    rows = read_rows(tmp_path / "out")
    same = {(r["length"], r["sample"], tuple(r["expected"]), r["depth"], r["prompt_tokens"]) for r in rows}
    assert (len(rows), len(same)) == (8, 4)
    assert {row["said_tokens"] for row in rows} == {4}
    assert len({row["expected"][0] for row in rows}) == 2
    assert json.loads((tmp_path / "out" / "run.json").read_text())["identity"]["tasks"] == ["passkey"]
    assert main([*arguments, "--out", str(tmp_path / "b"), "--tasks", "niah_single_1", "--lengths", "64"]) == 2
    assert "length 64 is too short for the task niah_single_1" in capsys.readouterr().err


# Presses of kvpress, with a stand-in of that package


@dataclasses.dataclass
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


def test_presses_stand_beside_other_methods_where_the_prefill_is_dense(kvpress, tmp_path):
    methods = ("--methods", "dense", "nc-topk", "kvpress:RecentPress", "--tasks", "recall", "--phase", "question")
    assert main(sweep_arguments(tmp_path, tmp_path / "out", *methods)) == 0
    budgets = {(row["length"], row["method"]): row["budget"] for row in read_rows(tmp_path / "out")}
    assert budgets[96, "kvpress:RecentPress"] == budgets[96, "nc-topk"]
    assert "Recent (kvpress)" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_presses_that_are_not_there_are_refused_with_what_is(kvpress, monkeypatch, tmp_path):
    for name in ("BasePress", "NoSuchPress"):
        with pytest.raises(EvalError, match="it has RecentPress"):
            find_press(name)
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(EvalError, match=r"pip install kvpress\), which cannot be imported: import of kvpress halted"):
        find_press("SnapKVPress")
    (tmp_path / "kvpress").mkdir()
    (tmp_path / "kvpress" / "__init__.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kvpress", raising=False)
    with pytest.raises(EvalError, match="cannot be imported: No module named 'a_package_that_is_not_there'"):
        find_press("SnapKVPress")

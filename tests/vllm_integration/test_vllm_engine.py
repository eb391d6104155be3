"""vLLM with the plugin gives the text that ``patch_model`` gives for each request alone."""

import random
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/setup_vllm.sh makes an environment with it")
pytestmark = pytest.mark.slow

SMALL = {"alpha": 4, "C": 0.5, "dense_below": 0}
# Options of vllm.LLM, and what the job asks beside.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chunks of 256 beside other requests": ({}, {}),
    "prompts from shared prefixes": ({}, {"repeat": 2}),
    "blocks of 128, chunks cut by other requests": (
        {"block_size": 128, "max_num_batched_tokens": 200, "enable_prefix_caching": False}, {},
    ),
    "drafts from n-grams": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}}, {},
    ),
    "the engine in a process of its own": ({}, {"processes": True}),
    "compiled": ({"enforce_eager": False}, {}),
    "tensor parallelism over three processes": ({"tensor_parallel_size": 3}, {"processes": True}),
}  # fmt: skip
# Which figure shows that it happened.
COUNTERS = {"prompts from shared prefixes": "cached", "drafts from n-grams": "accepted"}


def custom(settings: dict[str, Any]) -> dict[str, Any]:
    return {"attention_backend": "CUSTOM", "additional_config": {"nc_patch": settings}}


def assert_same(found: dict[str, Any], wanted: dict[str, Any], atol: float = 1e-3) -> None:
    assert found["tokens"] == wanted["tokens"]
    assert found["logprobs"] == [pytest.approx(logprobs, abs=atol) for logprobs in wanted["logprobs"]]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_running_gives_the_text_of_each_request_alone(engine, reference, prompts, way):
    options, job = WAYS[way]
    found = engine(prompts, {**custom(SMALL), **options}, **job)
    # Compiled layers round otherwise, so that of two pages that weigh the same the other may be chosen.
    assert_same(found, reference(prompts, {**SMALL, "selection": "block"}), 1e-2 if way == "compiled" else 1e-3)
    if way in COUNTERS:
        assert found[COUNTERS[way]] > 0


def test_requests_that_are_preempted_and_computed_anew_give_the_same_text(engine, reference, prompts):
    """Five need 18 blocks to begin with and one more each; there are 19."""
    some = [
        prompts[2][start : start + length] for start, length in ((0, 60), (9, 120), (20, 250), (30, 316), (40, 380))
    ]
    limits = {"num_gpu_blocks_override": 20, "max_model_len": 512, "max_num_seqs": 5, "enable_prefix_caching": False}
    found = engine(some, {**custom(SMALL), **limits})
    assert found["preemptions"] > 0
    assert_same(found, reference(some, {**SMALL, "selection": "block"}))


def test_small_budgets_change_the_text(reference, prompts):
    dense, sparse = reference(prompts, None), reference(prompts, {**SMALL, "selection": "block"})
    assert sum(a != b for a, b in zip(dense["tokens"], sparse["tokens"], strict=True)) >= 3


def test_a_full_budget_and_an_engine_without_the_plugin_give_the_text_of_dense_attention(engine, reference, prompts):
    some = prompts[:2] + prompts[4:5]
    dense = reference(some, None)
    assert_same(engine(some, custom({"alpha": 1, "C": 1})), dense)
    assert_same(engine(some, {}), dense)


# One law a head, in ranks that have a third of the heads; pages of 32 keys; other selections for the prompt.
SETTINGS = {
    "a budget for each head": {
        "alpha": [[2.0 + (layer + head) % 4 for head in range(9)] for layer in range(30)], "C": 0.5, "dense_below": 64,
    },
    "pages of 32 keys": {"alpha": 4, "C": 0.5, "dense_below": 0, "block_size": 32},
    "top-k for the prompt, some layers dense": {
        "alpha": 4, "C": 0.5, "dense_below": 0, "prefill": "topk", "decode": "block", "dense_layers": [0, 29],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_mean_what_they_mean_in_patch_model(engine, reference, prompts, name):
    settings = SETTINGS[name]
    options: dict[str, Any] = {"tensor_parallel_size": 3} if "head" in name else {}
    found = engine(prompts, {**custom(settings), **options}, processes=bool(options))
    # The default, which is 0 in the process of a test, and not in that of an engine.
    assert_same(found, reference(prompts, {"decode": "block", "dense_below": 1024, **settings}))


def test_a_prompt_longer_than_the_default_dense_below_is_dense_up_to_there(engine, reference, prompts):
    long = [(prompts[2] + prompts[5])[:1301]]
    wanted = reference(long, {"alpha": 1, "C": 0.5, "decode": "block", "dense_below": 1024})
    assert_same(engine(long, custom({"alpha": 1, "C": 0.5})), wanted)
    for other in (None, {"alpha": 1, "C": 0.5, "decode": "block", "dense_below": 0}):
        assert reference(long, other)["logprobs"] != wanted["logprobs"]


def test_a_hundred_requests_of_mixed_lengths_at_once_all_get_their_own_text(engine, reference, prompts):
    draw = random.Random(0)
    text = prompts[2] + prompts[5]
    many = []
    for _ in range(100):
        length = draw.choice((1, 2, 63, 64, 65, 128, draw.randint(3, 60), draw.randint(60, 200)))
        start = draw.randrange(len(text) - length)
        many.append(text[start : start + length])
    found = engine(many, {**custom(SMALL), "max_num_seqs": 32, "max_num_batched_tokens": 512}, tokens=4)
    wanted = reference(many, {**SMALL, "selection": "block"}, 4)
    assert found["tokens"] == wanted["tokens"]
    # Number 79 has two pages that weigh the same: embeddings scaled by 1 + 1e-6 change the reference's choice too.
    for result in (found, wanted):
        del result["tokens"][79], result["logprobs"][79]
    assert_same(found, wanted)

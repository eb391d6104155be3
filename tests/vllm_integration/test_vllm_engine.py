"""vLLM with the plugin gives the text that ``patch_model`` gives for each request alone."""

from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/setup_vllm.sh makes an environment with it")
pytestmark = pytest.mark.slow

SMALL = {"alpha": 4, "C": 0.5, "dense_below": 0}
# Settings, options of vllm.LLM, and what the job asks beside.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "chunks of 256 beside other requests": (SMALL, {}, {}),
    "prompts from shared prefixes": (SMALL, {}, {"repeat": 2}),
    "blocks of 128, chunks cut by other requests": (
        SMALL, {"block_size": 128, "max_num_batched_tokens": 200, "enable_prefix_caching": False}, {},
    ),
    "drafts from n-grams": (
        SMALL, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}}, {},
    ),
    "the engine in a process of its own": (SMALL, {}, {"processes": True}),
    "compiled": (SMALL, {"enforce_eager": False}, {}),
    "tensor parallelism over three processes": (SMALL, {"tensor_parallel_size": 3}, {"processes": True}),
    "a budget for each head, which ranks have a third of": (
        {**SMALL, "alpha": [[2.0 + (layer + head) % 4 for head in range(9)] for layer in range(30)], "dense_below": 64},
        {"tensor_parallel_size": 3}, {"processes": True},
    ),
    "pages of 32 keys": ({**SMALL, "block_size": 32}, {}, {}),
    "top-k for the prompt, some layers dense": ({**SMALL, "prefill": "topk", "dense_layers": [0, 29]}, {}, {}),
}  # fmt: skip
# Which figure shows that it happened.
COUNTERS = {"prompts from shared prefixes": "cached", "drafts from n-grams": "accepted"}


def custom(settings: dict[str, Any]) -> dict[str, Any]:
    """Options of an engine with the plugin."""
    return {"attention_backend": "CUSTOM", "additional_config": {"nc_patch": settings}}


def patch(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings for ``patch_model``, with the default that is 0 in the process of a test."""
    return {"decode": "block", "dense_below": 1024, **settings}


def assert_same(found: dict[str, Any], wanted: dict[str, Any], atol: float = 1e-3) -> None:
    assert found["tokens"] == wanted["tokens"]
    assert found["logprobs"] == [pytest.approx(logprobs, abs=atol) for logprobs in wanted["logprobs"]]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_running_gives_the_text_of_each_request_alone(engine, reference, prompts, way):
    settings, options, job = WAYS[way]
    found = engine(prompts, {**custom(settings), **options}, **job)
    # Compiled layers round otherwise, so that of two pages that weigh the same the other may be chosen.
    assert_same(found, reference(prompts, patch(settings)), 1e-2 if way == "compiled" else 1e-3)
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
    assert_same(found, reference(some, patch(SMALL)))


def test_small_budgets_change_the_text(reference, prompts):
    dense, sparse = reference(prompts, None), reference(prompts, patch(SMALL))
    assert sum(a != b for a, b in zip(dense["tokens"], sparse["tokens"], strict=True)) >= 3


def test_a_full_budget_and_an_engine_without_the_plugin_give_the_text_of_dense_attention(engine, reference, prompts):
    some = prompts[:2] + prompts[4:5]
    dense = reference(some, None)
    assert_same(engine(some, custom({"alpha": 1, "C": 1})), dense)
    assert_same(engine(some, {}), dense)


def test_a_prompt_longer_than_the_default_dense_below_is_dense_up_to_there(engine, reference, prompts):
    long = [(prompts[2] + prompts[5])[:1301]]
    wanted = reference(long, patch({"alpha": 1, "C": 0.5}))
    assert_same(engine(long, custom({"alpha": 1, "C": 0.5})), wanted)
    for other in (None, patch({"alpha": 1, "C": 0.5, "dense_below": 0})):
        assert reference(long, other)["logprobs"] != wanted["logprobs"]

"""Continuous batching of transformers on a patched model: each request gets the tokens that generate gives it alone."""

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import RequestState
from ways import generated_alone

from nc_patch import NCConfig, UnsupportedModelError, nc_stats, patch_model, patched, unpatch_model

NEW = 14
NO_END = {"max_new_tokens": NEW, "pad_token_id": 0}
GREEDY = GenerationConfig(**NO_END, do_sample=False)
PAGES = {"alpha": 2.0, "C": 0.5, "dense_below": 0, "decode": "block"}
Tokens = list[list[int]]


@pytest.fixture(scope="module")
def prompts() -> Tokens:
    """Some as long as whole pages, some with a prompt's last token in a pass of its own, two that begin alike."""
    draw = torch.Generator().manual_seed(1)
    found = [torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for n in (5, 37, 128, 65, 200)]
    return [*found, found[4][:96] + found[1][:20]]


@pytest.fixture(scope="module")
def dense(prompts) -> tuple[Tokens, list[float]]:
    """What the unpatched model makes of them."""
    return batched(tiny_model("llama", max_position_embeddings=1024), prompts)


def model_with(**settings: Any) -> Any:
    """Patched to decode by pages, with a small budget, unless other settings are given."""
    return patch_model(tiny_model("llama", max_position_embeddings=1024), **PAGES | settings)


def memory(**options: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**{"page_size": 16, "num_blocks": 120, "max_batch_tokens": 64, **options})


def alone(model: Any, prompts: Tokens) -> tuple[Tokens, list[float]]:
    """Tokens of generate for each prompt by itself, and their log-probabilities."""
    found = generated_alone(model, prompts, NEW)
    return found["tokens"], [each for request in found["logprobs"] for each in request]


def batched(model: Any, prompts: Tokens, copies: int = 1, **options: Any) -> tuple[Tokens, list[float]]:
    """The same of all prompts together; each ``copies`` times, which shares or copies the blocks of its prompt."""
    # Several continuations need sampling, of which top_k=1 leaves nothing to chance.
    sampling = GenerationConfig(**NO_END, do_sample=True, top_k=1, num_return_sequences=copies)
    how = sampling if copies > 1 else GREEDY
    found = model.generate_batch(prompts, how, memory(return_logprobs=True, **options))
    assert [output.error for output in found.values()] == [None] * (len(prompts) * copies)
    outputs = [output for output in found.values() if "child" not in output.request_id or copies > 1]
    return [output.generated_tokens for output in outputs], [x for output in outputs for x in output.logprobs]


def assert_as_alone(model: Any, prompts: Tokens, copies: int = 1, **options: Any) -> Tokens:
    tokens, logprobs = alone(model, prompts)
    found, found_logprobs = batched(model, prompts, copies, **options)
    assert found == [request for request in tokens for _ in range(copies)]
    if copies == 1:
        assert found_logprobs == pytest.approx(logprobs, abs=2e-3)
    return tokens


NO_TABLES = {"max_blocks_per_request": 0}
SEVERAL = {"copies": 3, "num_blocks": 300}


@pytest.mark.parametrize(
    ("settings", "options", "some"),
    [
        ({"prefill": "dense"}, {}, range(6)),
        ({"prefill": "topk"}, {}, range(6)),
        ({"prefill": "topk"}, NO_TABLES, range(6)),
        ({"prefill": "topk", "block_size": 32}, {"page_size": 64}, range(6)),
        ({"prefill": "topk", "alpha": [2.0, [1.0, 2.0, 3.0, 4.0], 1.5], "dense_layers": [2]}, {}, range(6)),
        ({"prefill": "topk", "dense_below": 100}, {"allow_block_sharing": False}, range(6)),
        ({"prefill": "block"}, {"max_batch_tokens": 1024, "allow_block_sharing": False}, range(6)),
        ({"prefill": "block"}, {"max_batch_tokens": 128}, [4]),  # in pieces of whole query blocks
        ({"prefill": "window", "decode": "window"}, NO_TABLES, range(6)),
        ({"prefill": "topk", "decode": "dense"}, {"scheduler_type": "prefill_first"}, range(6)),
        ({"prefill": "topk"}, SEVERAL, [4, 3, 2]),
        ({"prefill": "topk"}, SEVERAL | {"page_size": 64, "allow_block_sharing": False}, [4, 3, 2]),
    ],
    ids=str,
)
def test_each_request_gets_what_it_gets_alone(prompts, dense, settings, options, some):
    model = model_with(**settings)
    tokens = assert_as_alone(model, [prompts[i] for i in some], **options)
    assert tokens != [dense[0][i] for i in some]
    assert nc_stats(model)["attended_fraction"] < 0.9


@pytest.mark.parametrize("settings", [{}, {"decode": "topk"}, {"prefill": "topk", "decode": "window"}])
def test_with_a_full_budget_it_is_that_of_the_unpatched_model(prompts, dense, settings):
    found, logprobs = batched(model_with(alpha=1.0, C=1.0, **settings), prompts)
    assert found == dense[0]
    assert logprobs == pytest.approx(dense[1], abs=1e-4)


def test_a_query_block_that_a_pass_cuts_attends_every_key_and_the_statistics_say_so(prompts):
    model, dense = model_with(prefill="block"), model_with(prefill="dense")
    prompt = prompts[4][:63]
    tokens, logprobs = alone(dense, [prompt])
    found, found_logprobs = batched(model, [prompt], max_batch_tokens=40)
    assert found == tokens
    assert found_logprobs == pytest.approx(logprobs, abs=2e-3)
    assert nc_stats(model)["attended_fraction"] == nc_stats(dense)["attended_fraction"]


def test_a_request_that_is_computed_again_continues_as_it_began(prompts, monkeypatch):
    again, begin_again = [], RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", lambda self: again.append(self) or begin_again(self)
    )
    # Each grows out of its sixth block, and there is one block more.
    requests = [prompts[4][start : start + 95] for start in (0, 50, 100)]
    little = {"num_blocks": 19, "max_batch_tokens": 512, "safety_margin": 0.0, "allow_block_sharing": False}
    assert_as_alone(model_with(prefill="topk"), requests, **little)
    assert any(request.generated_tokens for request in again)


def test_a_request_counts_what_generate_counts(prompts):
    model, other = model_with(prefill="topk"), model_with(prefill="topk")
    alone(model, [prompts[3]])
    batched(other, [prompts[3]])
    for name in ("attended_fraction", "mean_keys"):
        assert nc_stats(other)[name] == pytest.approx(nc_stats(model)[name])


def test_a_session_that_is_kept_serves_again_until_the_model_is_patched_anew(prompts):
    model = model_with(prefill="topk")
    expected = alone(model, prompts)[0]
    for _ in range(2):
        found = model.generate_batch(prompts, GREEDY, memory(), persistent_manager=True)
        assert [output.generated_tokens for output in found.values()] == expected
    with patched(model, **{**PAGES, "alpha": 1.0, "prefill": "topk"}):
        assert assert_as_alone(model, prompts[3:]) != expected[3:]
    assert batched(model, prompts)[0] == expected


def test_unpatching_gives_back_the_models_own_continuous_batching(prompts, dense):
    model = unpatch_model(model_with())
    assert "init_continuous_batching" not in model.__dict__
    tokens, logprobs = batched(model, prompts)
    assert tokens == dense[0]
    # Which requests share a pass depends on the time, and so does how sums are rounded.
    assert logprobs == pytest.approx(dense[1], abs=1e-4)
    assert type(model.init_continuous_batching(GenerationConfig(**NO_END))) is ContinuousBatchingManager
    assert model.config._attn_implementation == "sdpa"


def test_a_session_goes_on_after_a_pause_and_fails_when_the_model_is_unpatched(prompts):
    model = model_with(prefill="topk")
    expected = alone(model, prompts)[0]
    with model.continuous_batching_context_manager(GREEDY, continuous_batching_config=memory()) as manager:
        manager.add_requests(prompts)
        with manager.pause():
            assert alone(model, prompts[:2])[0] == expected[:2]
        found = {output.request_id: output.generated_tokens for output in _finished(manager, len(prompts))}
        assert [found[f"req_{i}"] for i in range(len(prompts))] == expected
        unpatch_model(model)
        manager.add_request(prompts[0])
        [failed] = _finished(manager, 1)
    assert "patched or unpatched" in failed.error
    assert model.config._attn_implementation == "sdpa"


def _finished(manager: ContinuousBatchingManager, count: int) -> list[Any]:
    found: list[Any] = []
    while len(found) < count:
        output = manager.get_result(timeout=60)
        assert output is not None
        found += [output] if output.is_finished() else []
    return found


@pytest.mark.parametrize(
    ("family", "settings", "options", "message"),
    [
        ("llama", {"alpha": 2.0, "C": 0.5}, {}, 'decode="topk".*patch with decode="block"'),
        ("llama", {**PAGES, "track": True}, {}, "kept mass: patch without track"),
        ("llama", PAGES, {"cpu_offload_space": 1.0}, "cpu_offload_space.*set it to 0"),
        ("llama", PAGES, {"page_size": 24}, "page_size=24: give a multiple of 16"),
        ("llama", PAGES, {"use_cuda_graph": (False, True)}, "use_cuda_graph=.*leave it out"),
        ("llama", PAGES, {"cache_implementation": "quantized"}, "quantized cache: leave cache_implementation out"),
        ("mistral", PAGES, {}, "sliding_attention layers.*use generate"),
    ],
)
def test_what_would_not_be_as_generate_is_refused_by_name(family, settings, options, message):
    model = patch_model(tiny_model(family), config=NCConfig(**settings))
    named = GenerationConfig(**NO_END, cache_implementation=options.pop("cache_implementation", None))
    with pytest.raises(UnsupportedModelError, match=message):
        model.generate_batch([[3, 4, 5]], named, continuous_batching_config=ContinuousBatchingConfig(**options))

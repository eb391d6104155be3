"""Serving: pipelines, continuous batching, threads, inference mode; what is refused instead of running dense."""

import copy
import threading

import pytest
import torch
from tiny_models import random_ids, tiny_model
from tiny_sweep import tiny_text, tiny_tokenizer
from transformers import GenerationConfig, TextGenerationPipeline
from ways import FULL, SMALL, attended_fraction, full, small

from nc_patch import (
    NCConfig,
    UnsupportedModelError,
    is_patched,
    nc_stats,
    patch_model,
    patched,
    reset_stats,
    unpatch_model,
)
from nc_patch.stats import LayerCounters

THREADS = 4


def in_threads(work, count=THREADS):
    """Results of ``work(i)`` in so many threads, begun together; raises what one of them raised."""
    results, problems, together = {}, [], threading.Barrier(count)

    def run(i):
        try:
            together.wait()
            results[i] = work(i)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return [results[i] for i in range(count)]


def test_a_pipeline_writes_what_dense_writes_and_with_a_small_budget_what_each_text_gets_alone():
    texts = [tiny_text(words, seed=words) for words in (30, 12, 21)]
    how = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}

    def written(model, texts, **options):
        tokenizer = tiny_tokenizer()
        tokenizer.padding_side = "left"
        found = TextGenerationPipeline(model=model, tokenizer=tokenizer)(texts, **how, **options)
        return [text["generated_text"] for [text] in found]

    assert written(full(), texts, batch_size=3) == written(tiny_model("llama"), texts, batch_size=3)
    model = small()
    assert written(model, texts, batch_size=3) == [written(model, [text])[0] for text in texts]
    assert attended_fraction(model) < 0.7


def test_continuous_batching_is_refused_by_name_before_anything_runs():
    model, ids = small(), random_ids(1, 20)
    with pytest.raises(ValueError, match="Implementation nc_sparse is not supported for continuous batching"):
        model.generate_batch([[3, 4, 5], [6, 7]], GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=2))
    assert nc_stats(model)["layers"][0]["calls"] == 0
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, small()(ids).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_patched_model_that_was_switched_to_another_implementation_does_not_run_dense_in_silence(family):
    model, ids = small(family), random_ids(1, 20)
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match=r"is patched, but .* set to 'eager' since.*unpatch_model"):
        model(ids)
    other = copy.deepcopy(model)
    with torch.inference_mode():
        unpatch_model(model)
        assert model.config._attn_implementation == "eager"
        eager = tiny_model(family)
        eager.set_attn_implementation("eager")
        assert torch.equal(model(ids).logits, eager(ids).logits)
        assert torch.equal(patch_model(other, *SMALL, selection="topk")(ids).logits, small(family)(ids).logits)
        assert unpatch_model(other).config._attn_implementation == "eager"


def test_attention_weights_are_refused_by_name():
    model, ids = small(), random_ids(1, 20)
    with pytest.raises(UnsupportedModelError, match=r"asks for attention weights \(output_attentions\)"):
        model(ids, output_attentions=True)
    assert bool(model(ids, output_hidden_states=True).hidden_states[0].isfinite().all())


def test_threads_that_generate_on_one_model_get_what_one_alone_gets_and_every_call_is_counted():
    prompts = [random_ids(1 + i % 2, 20 + 5 * i) for i in range(THREADS)]
    generate = lambda model, i: model.generate(prompts[i], max_new_tokens=12, do_sample=False)  # noqa: E731
    model = small()
    alone = [generate(model, i) for i in range(THREADS)]
    expected = nc_stats(model)
    reset_stats(model)
    for found, text in zip(in_threads(lambda i: generate(model, i)), alone, strict=True):
        assert torch.equal(found, text)
    stats = nc_stats(model)
    assert [layer["calls"] for layer in stats["layers"]] == [layer["calls"] for layer in expected["layers"]]
    assert stats["mean_keys"] == pytest.approx(expected["mean_keys"])


def test_counters_lose_nothing_when_threads_count_calls_of_several_shapes():
    config, calls, counters = NCConfig(*SMALL), 400, LayerCounters()

    def count(i):
        n = torch.arange(1, 2 + i, dtype=torch.int32)
        visible = torch.stack((torch.zeros_like(n), n), -1)[None]
        budget = config.budget(n)[None, None]
        for _ in range(calls):
            counters.add_later(budget, visible)
            counters.keys.read()
        return float(budget.sum())

    attended = in_threads(count)
    assert counters.calls == THREADS * calls
    assert counters.keys.read()[0] == calls * sum(attended)


def test_threads_that_patch_models_of_one_config_leave_each_as_it_was():
    first, ids = tiny_model("llama"), random_ids(1, 30)
    models = [first] + [type(first)(first.config).eval() for _ in range(THREADS - 1)]

    def patch_again_and_again(i):
        for _ in range(20):
            with patched(models[i], *SMALL, selection="topk"), torch.inference_mode():
                models[i](ids)
        return is_patched(models[i])

    assert in_threads(patch_again_and_again) == [False] * THREADS
    assert first.config._attn_implementation == "sdpa"
    with torch.inference_mode():
        assert torch.equal(first(ids).logits, tiny_model("llama")(ids).logits)


def test_a_model_patched_and_run_in_inference_mode_runs_and_trains_outside_it():
    model, ids = tiny_model("llama"), random_ids(2, 30)
    with torch.inference_mode():
        inside = patch_model(model, *SMALL, selection="topk")(ids).logits
        text = model.generate(ids, max_new_tokens=4, do_sample=False)
    torch.testing.assert_close(model(ids).logits.detach(), inside.clone(), atol=1e-6, rtol=0)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), text)
    model.train()(ids, labels=ids).loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
    with torch.inference_mode():
        unpatch_model(model.eval())
        assert torch.equal(model(ids).logits, tiny_model("llama")(ids).logits)


def test_two_patched_models_run_by_turns_within_one_generation():
    first, second = small(), patch_model(tiny_model("gemma2"), *FULL, selection="topk")
    ids = random_ids(1, 40)
    alone = [model.generate(ids, max_new_tokens=8, do_sample=False) for model in (first, second)]
    assert torch.equal(first.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=second), alone[0])
    assert torch.equal(second.generate(ids, max_new_tokens=8, do_sample=False, assistant_model=first), alone[1])

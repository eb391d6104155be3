"""``torch.compile`` around a patched model: the numbers of dense attention with a full budget, and of eager mode."""

import pytest
import torch
from tiny_models import random_ids, tiny_model
from torch._dynamo import lookup_backend
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig
from ways import BLOCKS, EACH_SELECTION, TOPK, UNASKED, each_family, full_and_small, small

from nc_patch import sparse_attention

SELECTIONS = [
    {"selection": "topk"},
    {"selection": "topk", "tail": "drop"},
    {"selection": "window"},
    {"selection": "block"},
]


@EACH_SELECTION
@pytest.mark.parametrize("family", each_family("gemma2"))
def test_a_compiled_forward_equals_dense_and_the_eager_one(family, selections):
    ids = random_ids(2, 70)
    for model, reference in full_and_small(family, **selections):
        torch._dynamo.reset()
        with torch.inference_mode():
            expected = reference(ids, use_cache=False).logits
            found = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, use_cache=False).logits
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def generated_by_compiled_steps(model, ids):
    """The tokens of generation with a static cache, which compiles its steps, and how many graphs they took."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):  # a function, since the settings are copied deeply
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    how = CompileConfig(backend=backend, fullgraph=True, mode=None)
    how._compile_all_devices = True
    found = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static", compile_config=how)
    return found, len(graphs)


@EACH_SELECTION
@pytest.mark.parametrize("family", each_family("llama"))
def test_generate_compiles_itself_on_a_static_cache(family, selections):
    ids = random_ids(2, 40)
    _, graphs_of_dense = generated_by_compiled_steps(tiny_model(family), ids)
    assert graphs_of_dense <= 2  # the length of a sliding cache is first taken for a constant
    for model, reference in full_and_small(family, **selections):
        found, graphs = generated_by_compiled_steps(model, ids)
        assert torch.equal(found, reference.generate(ids, max_new_tokens=6, do_sample=False))
        assert graphs == graphs_of_dense  # a step is not compiled anew


@EACH_SELECTION
@pytest.mark.parametrize("family", each_family("llama"))
def test_prompts_of_many_lengths_share_their_graphs(family, selections):
    model, frames = small(family, **selections), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=frames, fullgraph=True)
    with torch.inference_mode():
        for length in (40, 20, 31, 9, 55, 64):  # of a page or less too
            ids = random_ids(2, length)
            found, expected = (m(ids, use_cache=False).logits for m in (compiled, model))
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert frames.frame_count == 2  # the first length is taken for a constant


@pytest.mark.parametrize("selections", [TOPK, {"selection": "window"}, BLOCKS, UNASKED], ids=str)
def test_a_compiled_step_of_training_has_the_gradients_of_an_eager_one(selections):
    model, ids, gradients = small(**selections).train(), random_ids(2, 70), []
    torch._dynamo.reset()
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        run(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


def test_a_compiled_call_refuses_a_padding_mask_with_holes():
    model, ids, mask = small(), random_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :10] = 0
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        found, expected = (m(ids, attention_mask=mask, use_cache=False).logits for m in (compiled, model))
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=0)
        mask[0, 20] = 0
        with pytest.raises(RuntimeError, match=r"the padding mask has holes.*to generate, to the left"):
            compiled(ids, attention_mask=mask, use_cache=False)


class Logits(torch.nn.Module):
    """The logits of a model without a cache, for ``torch.export``."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


class Attention(torch.nn.Module):
    """``sparse_attention`` with settings, for ``torch.export``."""

    def __init__(self, settings):
        super().__init__()
        self.settings = settings

    def forward(self, query, key, value):
        return sparse_attention(query, key, value, alpha=2.0, C=0.5, **self.settings)


@pytest.mark.parametrize(
    "settings", [*SELECTIONS, {"family": "gemma2"}, UNASKED], ids=lambda settings: "-".join(map(str, settings.values()))
)
def test_an_exported_model_takes_every_length_from_two_on(settings):
    logits, length = Logits(small(**settings)), torch.export.Dim("length", min=2, max=8192)
    exported = torch.export.export(logits, (random_ids(2, 40),), dynamic_shapes=({1: length},)).module()
    for ids in (random_ids(2, length) for length in (2, 9, 16, 17, 70)):
        torch.testing.assert_close(exported(ids), logits(ids), atol=2e-5, rtol=0)


@pytest.mark.parametrize("settings", SELECTIONS, ids=lambda settings: "-".join(settings.values()))
def test_exported_attention_takes_every_number_of_queries_and_keys(settings):
    attention, rows = Attention(settings), lambda heads, length: torch.randn(1, heads, length, 16)
    queries, keys = torch.export.Dim("queries", min=2, max=512), torch.export.Dim("keys", min=2, max=4096)
    exported = torch.export.export(
        attention,
        (rows(4, 40), rows(2, 90), rows(2, 90)),
        dynamic_shapes=({2: queries}, {2: keys}, {2: keys}),
    ).module()
    for asked, seen in ((2, 2), (2, 9), (9, 17), (60, 70), (2, 300)):
        inputs = (rows(4, asked), rows(2, seen), rows(2, seen))
        torch.testing.assert_close(exported(*inputs), attention(*inputs), atol=2e-5, rtol=0)

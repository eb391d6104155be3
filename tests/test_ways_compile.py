"""``torch.compile`` and ``torch.export``: the numbers of dense attention with a full budget, and of eager mode."""

import pytest
import torch
import ways
from tiny_models import random_ids, tiny_model
from torch._dynamo import lookup_backend
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig
from ways import assert_close, full_and_small, generated, small

from nc_patch import patch_model, sparse_attention, unpatch_model

# Compiling takes most of the time: no more layers than a family has kinds of. The index makes no other graphs; calls of
# few keys do.
LAYERS = {"gemma2": 2, "gpt_oss": 2}
PLAIN = {name: settings | {"dense_below": 0} for name, settings in ways.SETTINGS.items() if name != "topk by codes"}
EACH_PLAIN = pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN)
COMPILED = ("topk", "unasked")  # in the wide sweep over families


@pytest.fixture(autouse=True)
def compiled_anew():
    torch._dynamo.reset()


def whole(model, backend="aot_eager"):
    return torch.compile(model, backend=backend, fullgraph=True)


@ways.families_and_settings(("gemma2", "unasked"), names=COMPILED)
def test_compiled_prompts_of_many_lengths_equal_dense_and_eager_ones_and_share_their_graphs(family, settings):
    for model, reference in full_and_small(family, LAYERS.get(family, 1), **settings):
        torch._dynamo.reset()
        frames = CompileCounterWithBackend("eager")
        compiled = whole(model, frames)
        lengths = (70, 20, 31, 9, 55, 64) if model is reference else (70,)  # of a page or less too
        with torch.inference_mode():
            for ids in (random_ids(2, length) for length in lengths):
                assert_close(*(each(ids, use_cache=False).logits for each in (compiled, reference)))
        # The first length is taken for a constant, and few keys take a graph of their own.
        assert frames.frame_count <= min(2 + ("dense_below" in settings), len(lengths))


@pytest.mark.parametrize("way", ["padded left", "packed by positions", "packed by lengths"])
def test_a_compiled_call_keeps_rows_apart(way):
    rows, model = ways.rows_of(2), small(layers=1)
    with torch.inference_mode():
        assert_close(ways.WAYS[way](whole(model), rows), ways.alone(model, rows))


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


@ways.families_and_settings(("llama", "unasked"), names=COMPILED)
def test_generate_compiles_itself_on_a_static_cache(family, settings):
    ids = random_ids(2, 40)
    _, graphs_of_dense = generated_by_compiled_steps(tiny_model(family, num_hidden_layers=LAYERS.get(family, 1)), ids)
    assert graphs_of_dense <= 2  # the length of a sliding cache is first taken for a constant
    for model, reference in full_and_small(family, LAYERS.get(family, 1), **settings):
        found, graphs = generated_by_compiled_steps(model, ids)
        assert torch.equal(found, reference.generate(ids, max_new_tokens=6, do_sample=False))
        assert graphs == graphs_of_dense  # a step is not compiled anew


BY_LAYER = (2.0, 3.0)


@pytest.mark.parametrize(
    ("alpha", "new_cache", "options"),
    [
        (BY_LAYER, ways.dynamic_cache, ways.UNASKED),
        (2.0, ways.static_cache, ways.UNASKED | {"backend": "torch"}),
        (2.0, ways.static_cache, ways.TOPK | {"key_index": "always"}),
        (2.0, ways.static_cache, ways.BLOCKS),
        (BY_LAYER, ways.static_cache, ways.BLOCKS | {"backend": "torch"}),
    ],
)
def test_compiled_steps_share_a_graph_in_which_layers_share_what_is_worked_out_and_keep_the_index(
    alpha, new_cache, options
):
    static = new_cache is ways.static_cache
    # After ten steps on a static cache a row sees more keys than it attends whatever the law.
    options = options | {"dense_below": 70 if static else 0}
    model = patch_model(tiny_model("llama", num_hidden_layers=2), alpha, 0.8, **options)
    ids, graphs, logits = random_ids(2, 80), [], []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return lookup_backend("aot_eager")(graph, inputs)

    with torch.inference_mode():
        for forward in (model.forward, whole(model.forward, backend)):
            cache = new_cache(model.config)
            model(ids[:, :60], past_key_values=cache)
            steps = [forward(token, past_key_values=cache).logits for token in ids[:, 60:].split(1, 1)]
            logits.append(torch.cat(steps, 1))
    assert_close(*logits)
    assert len(graphs) == 2 - static  # the first length of a cache that grows is taken for a constant
    assert all(layer.nc_indexes for layer in cache.layers)
    for nodes in graphs:
        assert [sum(name in node for node in nodes) for name in ("nc_patch.row_budgets", "nc_patch.decode")] == [1, 2]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("between", [None, ways.BLOCKS], ids=["unpatched", "blocks"])
def test_a_compiled_step_decodes_by_no_index_that_lacks_keys(between, compiled):
    model, ids = tiny_model("llama", num_hidden_layers=1), random_ids(1, 71)
    steps, found = torch.compile(model, backend="eager", fullgraph=True), []
    for use, forward in (("never", model), ("always", steps)):
        cache = ways.static_cache(model.config)
        for first, last, settings in ((0, 50, {}), (50, 70, between), (70, 71, {})):
            patch_model(model, 1.0, 0.7, **settings or ways.TOPK, key_index=use, dense_below=0)
            if settings is None:
                unpatch_model(model)
            run = forward if first == 70 or (first == 50 and compiled) else model
            with torch.inference_mode():
                logits = run(ids[:, first:last], past_key_values=cache, use_cache=True).logits
        found.append(logits)
    assert_close(*found)


@EACH_PLAIN
def test_a_compiled_step_of_training_has_the_gradients_of_an_eager_one(settings):
    model, ids, gradients = small(layers=1, **settings).train(), random_ids(2, 70), []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        run(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


def test_a_compiled_call_refuses_holes_in_the_padding_and_to_look_at_what_is_dropped():
    holes, look = r"the padding mask has holes.*to generate, to the left", r'on_drop="dense" reads in layer 0 how much'
    for options, given, message in (
        ({}, ways.with_holes(ways.rows_of(2)), holes),
        ({"on_drop": "dense"}, {"input_ids": random_ids(1, 40)}, look),
    ):
        with torch.inference_mode(), pytest.raises(Exception, match=message):
            whole(small(layers=1, **options))(**given, use_cache=False)


@pytest.mark.parametrize("selection", ways.wide_but(["block"], ["topk", "window", "block"]))
def test_a_compiled_static_cache_takes_holes_that_were_there_from_the_first_call(selection):
    model, batch = small(layers=1, selection=selection, block_size=16), ways.with_holes(ways.rows_of(3, shortest=30))
    eager = generated(model, batch, cache_implementation="static")
    model.forward = whole(model.forward)
    assert torch.equal(generated(model, batch, cache_implementation="static"), eager)


def exported(function, inputs, shapes, model=None):
    """What ``torch.export`` makes of a function of tensors, and of the model that it runs."""

    class Call(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    call = Call()
    call.model = model
    return torch.export.export(call, tuple(inputs), dynamic_shapes=(shapes,)).module()


@pytest.mark.parametrize("name", ways.wide_but(["unasked"], ["gemma2", *PLAIN]))
def test_an_exported_model_takes_every_length_from_two_on(name):
    settings = PLAIN.get(name, {"family": name, "layers": 2})
    model, length = small(**{"layers": 1} | settings | {"dense_below": 16}), torch.export.Dim("length", min=2, max=8192)
    logits = lambda ids: model(ids, use_cache=False).logits  # noqa: E731
    run = exported(logits, [random_ids(2, 40)], ({1: length},), model)
    for ids in (random_ids(2, length) for length in (2, 9, 16, 17, 70)):
        assert_close(run(ids), logits(ids))


def test_numbers_that_are_symbols_or_arguments_break_no_graph():
    tensors, ids = torch.randn(3, 1, 2, 40, 16), random_ids(2, 70)
    call = lambda alpha, scale: sparse_attention(*tensors, alpha=alpha, C=0.5, scale=scale)  # noqa: E731
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for alpha, scale in ((2.0, 0.3), (1.5, 0.2), (2.5, 0.4)):
        assert_close(compiled(alpha, scale), call(alpha, scale))
    model = small("gemma2", layers=2, **PLAIN["unasked"])
    compiled = torch.compile(model, backend="eager", dynamic=True, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)

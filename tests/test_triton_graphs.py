"""CUDA graphs around the kernels, on a GPU: a replay equals the call, and budgets made in a warm-up outlive it."""

import pytest
import torch
from tiny_models import random_ids, tiny_model
from transformers import CompileConfig

from nc_patch import KeyIndex, patch_model, sparse_attention

pytestmark = pytest.mark.gpu
SELECTIONS = {"topk": "codes", "block": "pages"}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize(("selection", "tail"), [("topk", "mean"), ("topk", "drop"), ("block", "drop")])
def test_a_replayed_step_equals_the_call(selection, tail):
    torch.manual_seed(0)
    query, key, value = drawn(2, 8, 1, 64), drawn(2, 2, 5000, 64), drawn(2, 2, 5000, 64)
    options = {"alpha": 2.0, "C": 0.61, "selection": selection, "tail": tail}
    index = KeyIndex.build(key, SELECTIONS[selection])
    means = KeyIndex.build(key, "means", value=value) if tail == "mean" else None
    call = lambda: sparse_attention(query, key, value, index=index, means=means, **options)  # noqa: E731
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = call()
    for _ in range(3):
        query.copy_(drawn(*query.shape))
        graph.replay()
        torch.testing.assert_close(replayed, call(), atol=0, rtol=0)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_generation_by_graphs_gives_the_tokens_of_eager_generation(selection):
    ids = random_ids(2, 300).cuda()
    # Laws that nothing has used before: their tables are made in the warm-up of a graph, and those of the second model
    # over what the first one's graphs left.
    for alpha in (2.03125, 2.0625):
        torch._dynamo.reset()
        model = tiny_model("llama", head_dim=64).cuda()
        patch_model(model, alpha, 0.53, selection=selection, backend="triton")
        how = CompileConfig(mode="reduce-overhead", fullgraph=True)
        found = [
            model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation="static", compile_config=how)
            for _ in range(3)
        ]
        expected = model.generate(ids, max_new_tokens=12, do_sample=False)
        assert all(torch.equal(each, expected) for each in found)

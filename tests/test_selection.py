"""A selection is one file: the example of docs/selection.md works everywhere, and nothing else has to be written."""

import copy
import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from attention_cases import Shape
from operations import assert_close, problem_of_case
from tiny_models import random_ids, tiny_model

from nc_patch import nc_stats, patch_model
from nc_patch.selections import base

PAGE = Path(__file__).parent.parent / "docs" / "selection.md"


@pytest.fixture(scope="module")
def Stride():
    """The class of the page, which is not registered any more afterwards."""
    example = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[0]
    assert len(example.splitlines()) <= 40
    module = types.ModuleType("stride_example")
    sys.modules[module.__name__] = module
    exec(compile(example, str(PAGE), "exec"), vars(module))
    yield module.Stride
    del sys.modules[module.__name__], base._SELECTIONS["stride"]


def test_it_attends_exactly_what_it_says(Stride):
    sizes = {"batch": 2, "kv_heads": 2, "queries": 37, "keys": 90, "head_dim": 16, "value_dim": 8}
    case = Shape("stride", intervals="padding", sinks=True, softcap=20.0, **sizes).case()
    given, chosen = problem_of_case(case, stats=True), Stride(every=5)
    mask = chosen.mask(given, torch.zeros(2, 4, 37, 90))
    assert torch.equal(mask.sum(-1, dtype=torch.int32), given.budget.expand(-1, 4, -1))
    last = mask[0, 0, -1].nonzero()[:, 0].tolist()
    assert set(range(89, 89 - 5 * 18, -5)) <= set(last)
    expected, result = chosen.reference(given), chosen.run(given, "torch")
    for found, wanted in zip(result[:3], expected[:3], strict=True):
        assert_close(found, wanted, 1e-6)


def test_models_generate_compile_and_train_with_it(Stride):
    model = patch_model(tiny_model("llama"), 3.0, 0.5, selection="stride", every=4)
    ids = random_ids(2, 40)
    generated = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    # Token by token it attends what it attends in one go.
    alone = model(generated[:, :-1]).logits
    assert torch.equal(alone[:, 39:].argmax(-1), generated[:, 40:])
    assert 0 < nc_stats(model)["attended_fraction"] < 1
    twin = torch.compile(pickle.loads(pickle.dumps(copy.deepcopy(model))), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(twin(generated[:, :-1], use_cache=False).logits, alone, atol=2e-5, rtol=0)
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)

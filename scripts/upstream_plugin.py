"""A pytest plugin that patches every model which transformers' own tests run; loaded by ``upstream_tests.py``.

A model is patched when it first runs: at the outermost call of ``forward``, or of ``generate``, which builds masks
before. Three things in the suite are met half way:

- Tests that compare eager attention with SDPA keep their eager models, and so compare the patched model with eager
  attention.
- Elsewhere the suite's own switch ``has_attentions`` says that there are no attention weights to look at.
- Where a test hands ``generate`` a mask padded on the right or with holes, which is refused, the padding is moved to
  the left; in the run without patches too.

``NC_UPSTREAM_CONFIG`` holds the settings, an ``NCConfig`` as JSON; without it nothing is patched, and the plugin only
records. Each test's outcome goes to the file ``NC_UPSTREAM_RECORD``, one JSON object a line.
"""

import functools
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, PreTrainedModel

from nc_patch import NCConfig, UnsupportedModelError, patch_model
from nc_patch.hooks import IMPLEMENTATION
from nc_patch.patch import is_patched

_SETTINGS = os.environ.get("NC_UPSTREAM_CONFIG")
_CONFIG = NCConfig.from_dict(json.loads(_SETTINGS)) if _SETTINGS else None
# Part of the name of the tests in which eager models are the reference.
_COMPARES_WITH_EAGER = "eager_matches"
_patched: Counter[str] = Counter()
_refused: Counter[str] = Counter()


def _patch(model: torch.nn.Module) -> None:
    """Patches a model that is about to run, unless that is done; what cannot be patched runs as it is, and is noted."""
    assert _CONFIG is not None
    text = model.config.get_text_config(decoder=True)
    if is_patched(model) and text._attn_implementation == IMPLEMENTATION:
        return
    if _COMPARES_WITH_EAGER in os.environ["PYTEST_CURRENT_TEST"] and text._attn_implementation == "eager":
        return
    try:
        patch_model(model, config=_CONFIG)
    except UnsupportedModelError as error:
        _refused[f"{type(model).__name__}: {error}"] += 1
    else:
        _patched[type(model).__name__] += 1


def _before_forward(module: torch.nn.Module, _: Any) -> None:
    if isinstance(module, PreTrainedModel) and not torch.compiler.is_compiling():
        _patch(module)


def pytest_configure(config: pytest.Config) -> None:
    """Gets between the tests and ``forward`` and ``generate`` of every model."""
    if _CONFIG is not None:
        torch.nn.modules.module.register_module_forward_pre_hook(_before_forward)
    generate = GenerationMixin.generate

    @functools.wraps(generate)
    def prepared_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            kwargs["attention_mask"] = mask.sort(-1).values
        if _CONFIG is not None:
            _patch(self)
        return generate(self, *args, **kwargs)

    GenerationMixin.generate = prepared_generate


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Says that a patched model has no attention weights, where a test would look at them."""
    case = getattr(item, "cls", None)
    if _CONFIG is not None and hasattr(case, "has_attentions"):
        case.has_attentions = _COMPARES_WITH_EAGER in item.name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Writes down how a test ended, and which models it patched."""
    report = yield
    if report.when == "setup" and report.passed:
        _patched.clear()
        _refused.clear()
    if report.when == "call" or not report.passed:
        outcome = report.outcome
        line = "" if outcome == "passed" else str(report.longrepr).strip().splitlines()[-1][:300]
        if outcome == "skipped" and isinstance(report.longrepr, tuple):
            line = report.longrepr[2][:300]
        elif call.excinfo is not None and outcome == "failed":
            line = f"{call.excinfo.typename}: {call.excinfo.value}".splitlines()[0][:300]
        record = {
            "test": item.nodeid.split("tests/", 1)[-1],
            "outcome": outcome,
            "said": line,
            "patched": dict(_patched),
            "refused": dict(_refused),
        }
        with open(os.environ["NC_UPSTREAM_RECORD"], "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return report

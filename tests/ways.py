"""What every way of running a model is held to: a full budget gives dense attention's numbers, a small one its own."""

import contextlib
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, random_ids, tiny_model
from transformers import PreTrainedModel

from nc_patch import nc_stats, patch_model

# Every key, by way of the selection; and few enough keys that the output is far from dense.
FULL, SMALL = (1e6, 0.0), (2.0, 0.5)
# The paper's definition: the same choice in prefill and decoding, however a sequence is cut into calls.
TOPK = {"selection": "topk"}
# What patch_model does unasked, with query blocks and local keys of which a tiny model's prompt holds several.
UNASKED = {"query_block_size": 32, "local_keys": 0}
BLOCKS = {"selection": "block", "block_size": 16}
# Every kind of index, and none.
CHOICES = (TOPK, TOPK | {"key_index": "always"}, BLOCKS, UNASKED)
EACH_SELECTION = pytest.mark.parametrize("selections", [TOPK, UNASKED], ids=["topk", "unasked"])
# The families that a plain run goes through; the others run in the wide sweep.
CORE = ("llama", "gemma2")


def each_family(*core: str) -> list[Any]:
    """All families for ``parametrize``; those that are not among ``core`` are left to the wide sweep."""
    return [pytest.param(family, marks=() if family in core else pytest.mark.wide, id=family) for family in FAMILIES]


EACH_FAMILY = each_family(*CORE)


def small(family: str = "llama", **options: object) -> PreTrainedModel:
    """A tiny model with a small budget; top-k where the options choose nothing else."""
    return patch_model(tiny_model(family), *SMALL, **_with_selection(options))


def full(family: str = "llama", **options: object) -> PreTrainedModel:
    """A tiny model that attends every key, through the sparse operations; top-k as in ``small``."""
    return patch_model(tiny_model(family), *FULL, **_with_selection(options))


def full_and_small(family: str, **options: object) -> list[tuple[PreTrainedModel, PreTrainedModel]]:
    """Models and what must give their numbers: a full budget with the dense model, a small one with itself."""
    model = small(family, **options)
    return [(full(family, **options), tiny_model(family)), (model, model)]


def _with_selection(options: dict[str, Any]) -> dict[str, Any]:
    chooses = options.keys() & {"selection", "prefill", "decode", *UNASKED}
    return options if chooses else TOPK | options


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of ids ``[L]`` as a batch padded on the left: ``input_ids`` and ``attention_mask``."""
    length = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, length - len(row) :], mask[place, length - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def right_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of ids ``[L]`` as a batch padded on the right."""
    flipped = left_padded([row.flip(0) for row in rows])
    return {name: tensor.flip(1) for name, tensor in flipped.items()}


def rows_of(count: int, shortest: int = 20, step: int = 7) -> list[torch.Tensor]:
    """Up to eight rows of random ids, each of another length."""
    rows = [random_ids(shortest + step * (3 * place % 8)) for place in range(count)]
    assert len({len(row) for row in rows}) == count
    return rows


def attended_fraction(model: PreTrainedModel) -> float:
    """How much of what it saw a patched model attended."""
    fraction = nc_stats(model)["attended_fraction"]
    assert fraction is not None, "nothing ran through the patch"
    return fraction


class _NoStream(contextlib.nullcontext):
    """What stands in for a stream of an accelerator where there is none."""

    def wait_stream(self, stream: object) -> None:
        """Nothing runs apart, so that there is nothing to wait for."""


@pytest.fixture
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloaded caches on a machine without an accelerator: the same steps, from one memory to the same one."""
    monkeypatch.setattr(torch, "Stream", _NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: _NoStream())

"""Running out of memory, and Ctrl-C, at any line of a call: the model stays usable, and so does its cache, or says no.

A trace function raises the exception at the n-th line that runs inside the package, which is where an allocation may
fail and where a signal may arrive.
"""

import copy
import linecache
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache, StaticCache
from ways import EACH_SETTING, assert_close, state_of

import nc_patch
from nc_patch import BrokenCacheError, forget_index, nc_stats, patch_model, unpatch_model
from nc_patch.cache import layer_cache

PACKAGE = str(Path(nc_patch.__file__).parent)
LENGTH = 50


class Lines:
    """Counts the lines that run inside the package while it is open, and raises ``error`` at the ``at``-th of them."""

    def __init__(self, at: int | None = None, error: type[BaseException] = torch.OutOfMemoryError) -> None:
        self.count, self.at, self.error = 0, at, error

    def __enter__(self) -> "Lines":
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame, event, argument):
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame, event, argument):
        # Called once more where a with statement ends, which would stay open, as it does in no real fault.
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not source.lstrip().startswith("with "):
            self.count += 1
            if self.count == self.at:
                raise self.error("simulated")
        return self._line


@torch.no_grad()
def logits(model, ids, cache=None):
    return model(ids, past_key_values=cache, use_cache=cache is not None).logits[:, -1]


def copied(cache):
    """A copy of a cache with its indexes."""
    twin = copy.deepcopy(cache)
    for number, layer in enumerate(cache.layers):
        layer.nc_check()
        held = layer_cache(twin, number).layer
        held.nc_indexes = {kind: index.clone() for kind, index in layer.nc_indexes.items()}
        held.nc_settle()
    return twin


def without_index(model, options, cache, ids):
    """The logits of more tokens after what a cache holds, from its keys alone."""
    twin = copy.deepcopy(cache)
    forget_index(twin)
    patch_model(model, 1.0, 0.7, **options | {"key_index": "never"})
    expected = logits(model, ids, twin)
    patch_model(model, 1.0, 0.7, **options)
    return expected


def places(count: int, wanted: int) -> list[int]:
    """Some of the lines 1 to ``count``, the first and the last among them."""
    return sorted({*range(1, count + 1, max(1, count // wanted)), count})


@pytest.mark.parametrize(
    ("error", "new_tokens", "wanted"),
    [
        (torch.OutOfMemoryError, 1, 10),
        (KeyboardInterrupt, 1, 6),
        (torch.OutOfMemoryError, 40, 6),
        *(pytest.param(torch.OutOfMemoryError, count, 10**9, marks=pytest.mark.wide) for count in (1, 40)),
    ],
)
@EACH_SETTING
def test_a_decoding_step_or_a_later_piece_of_a_prompt_may_fail_anywhere(settings, error, new_tokens, wanted):
    model, ids = patch_model(tiny_model("llama"), 1.0, 0.7, **settings), random_ids(2, LENGTH + new_tokens + 1)
    new, next_one, filled = ids[:, LENGTH:-1], ids[:, -1:], DynamicCache()
    logits(model, ids[:, :LENGTH], filled)
    expected, fresh = without_index(model, settings, filled, new), logits(model, ids)
    logits(model, new, copied(filled))  # what is worked out once for all calls
    twin = copied(filled)
    with Lines() as lines:
        found = logits(model, new, twin)
    assert_close(found, expected)
    before, refused = state_of(model), 0
    for at in places(lines.count, wanted):
        cache = copied(filled)
        with pytest.raises(error, match="simulated"), Lines(at, error):
            logits(model, new, cache)
        assert state_of(model) == before
        # As it is: refused where some layers have taken the tokens and others have not, and right where they agree.
        used = copied(cache)
        if len({layer.get_seq_length() for layer in used.layers}) > 1:
            refused += 1
            with pytest.raises(BrokenCacheError, match="Start with a new cache"):
                logits(model, next_one, used)
        else:
            goes_on = without_index(model, settings, used, next_one)
            assert_close(logits(model, next_one, used), goes_on)
        for layer in cache.layers:  # as the message of ``BrokenCacheError`` says
            layer.crop(LENGTH - layer.get_seq_length())
        assert_close(logits(model, new, cache), expected)
        goes_on = without_index(model, settings, cache, next_one)
        assert_close(logits(model, next_one, cache), goes_on)
    assert refused
    assert torch.equal(logits(model, ids), fresh)
    nc_stats(model)
    unpatch_model(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@EACH_SETTING
def test_a_cache_is_right_again_once_it_is_reset_after_a_call_that_failed_anywhere(settings, static):
    model, ids = patch_model(tiny_model("llama"), 1.0, 0.7, **settings), random_ids(1, LENGTH + 1)
    # The first call on a dynamic cache, which makes its layers, and a later one on a static cache.
    *before, failing = ids.split([LENGTH, 1], 1) if static else (ids,)

    new = lambda: StaticCache(model.config, max_cache_len=80) if static else DynamicCache()  # noqa: E731

    def begun(cache):
        for piece in before:
            logits(model, piece, cache)
        return cache

    expected, cache = logits(model, failing, begun(new())), begun(new())
    with Lines() as lines:
        logits(model, failing, cache)
    for at in places(lines.count, 4):
        cache = begun(new())
        with pytest.raises(torch.OutOfMemoryError), Lines(at):
            logits(model, failing, cache)
        assert_close(logits(model, failing, begun(new())), expected)
        cache.reset()
        assert_close(logits(model, failing, begun(cache)), expected)

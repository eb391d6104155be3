"""Running out of memory, and Ctrl-C, at any line of a call: the model stays usable, and so does its cache, or says no.

A trace function raises the exception at the n-th line that runs inside the package, which is where an allocation may
fail and where a signal may arrive.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache, StaticCache

import nc_patch
from nc_patch import BrokenCacheError, forget_index, nc_stats, patch_model, unpatch_model

PACKAGE = str(Path(nc_patch.__file__).parent)
SETTINGS = {
    "topk": {"selection": "topk", "key_index": "always"},
    "drop": {"selection": "topk", "key_index": "always", "tail": "drop"},
    "block": {"selection": "block", "block_size": 16},
    "window": {"selection": "window"},
    "unasked": {"key_index": "always", "query_block_size": 32, "local_keys": 0},
}
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
        if event == "line":
            self.count += 1
            if self.count == self.at:
                raise self.error("simulated")
        return self._line


def state_of(model: torch.nn.Module) -> tuple:
    """What a call must leave as it was: hooks, threads, and whether gradients are recorded."""
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    return hooks, torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@torch.no_grad()
def logits(model, ids, cache=None):
    return model(ids, past_key_values=cache, use_cache=cache is not None).logits[:, -1]


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
    step = max(1, count // wanted)
    return sorted({*range(1, count + 1, step), count})


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("selection", SETTINGS)
def test_a_decoding_step_may_fail_anywhere(selection, error):
    fail_at_lines(selection, error, new_tokens=1, wanted=10)


@pytest.mark.parametrize("selection", SETTINGS)
def test_a_later_piece_of_a_prompt_may_fail_anywhere(selection):
    fail_at_lines(selection, torch.OutOfMemoryError, new_tokens=40, wanted=6)


@pytest.mark.wide
@pytest.mark.parametrize("new_tokens", [1, 40])
@pytest.mark.parametrize("selection", SETTINGS)
def test_every_line_of_a_call_may_fail(selection, new_tokens):
    fail_at_lines(selection, torch.OutOfMemoryError, new_tokens, wanted=10**9)


def fail_at_lines(selection: str, error: type[BaseException], new_tokens: int, wanted: int) -> None:
    options = SETTINGS[selection]
    model, ids = patch_model(tiny_model("llama"), 1.0, 0.7, **options), random_ids(2, LENGTH + new_tokens + 1)
    new, next_one = ids[:, LENGTH:-1], ids[:, -1:]
    filled = DynamicCache()
    logits(model, ids[:, :LENGTH], filled)
    expected = without_index(model, options, filled, new)
    fresh = logits(model, ids)
    twin = copy.deepcopy(filled)
    with Lines() as lines:
        found = logits(model, new, twin)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    before, refused = state_of(model), 0
    for at in places(lines.count, wanted):
        cache = copy.deepcopy(filled)
        with pytest.raises(error, match="simulated"), Lines(at, error):
            logits(model, new, cache)
        assert state_of(model) == before
        # As it is: refused where some layers have taken the tokens and others have not, and right where they agree.
        used = copy.deepcopy(cache)
        lengths = [layer.get_seq_length() for layer in used.layers]
        if len(set(lengths)) > 1:
            refused += 1
            with pytest.raises(BrokenCacheError, match="Start with a new cache"):
                logits(model, next_one, used)
        else:
            goes_on = without_index(model, options, used, next_one)
            torch.testing.assert_close(logits(model, next_one, used), goes_on, atol=1e-5, rtol=0)
        # As the message says.
        crop_layers(cache, LENGTH)
        torch.testing.assert_close(logits(model, new, cache), expected, atol=1e-5, rtol=0)
        goes_on = without_index(model, options, cache, next_one)
        torch.testing.assert_close(logits(model, next_one, cache), goes_on, atol=1e-5, rtol=0)
    assert refused
    torch.testing.assert_close(logits(model, ids), fresh, atol=0, rtol=0)
    nc_stats(model)
    unpatch_model(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def crop_layers(cache: DynamicCache, length: int) -> None:
    """What the message of ``BrokenCacheError`` says."""
    for layer in cache.layers:
        layer.crop(length - layer.get_seq_length())


@pytest.mark.parametrize("selection", SETTINGS)
def test_a_first_call_may_fail_anywhere(selection):
    options = SETTINGS[selection]
    ids = random_ids(1, LENGTH)
    model = patch_model(tiny_model("llama"), 1.0, 0.7, **options)
    logits(model, ids, DynamicCache())
    with Lines() as lines:
        expected = logits(model, ids, DynamicCache())
    for at in places(lines.count, 6):
        cache = DynamicCache()
        with pytest.raises(torch.OutOfMemoryError), Lines(at):
            logits(model, ids, cache)
        torch.testing.assert_close(logits(model, ids, DynamicCache()), expected, atol=0, rtol=0)
        cache.reset()
        torch.testing.assert_close(logits(model, ids, cache), expected, atol=0, rtol=0)


@pytest.mark.parametrize("selection", SETTINGS)
def test_a_static_cache_is_right_again_once_it_is_reset(selection):
    options = SETTINGS[selection]
    model, ids = patch_model(tiny_model("llama"), 1.0, 0.7, **options), random_ids(1, LENGTH + 1)
    cache = StaticCache(config=model.config, max_cache_len=80)
    logits(model, ids[:, :-1], cache)
    with Lines() as lines:
        expected = logits(model, ids[:, -1:], cache)
    for at in places(lines.count, 3):
        cache.reset()
        logits(model, ids[:, :-1], cache)
        with pytest.raises(torch.OutOfMemoryError), Lines(at):
            logits(model, ids[:, -1:], cache)
        cache.reset()
        logits(model, ids[:, :-1], cache)
        torch.testing.assert_close(logits(model, ids[:, -1:], cache), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("selection", SETTINGS)
@pytest.mark.parametrize(("layer", "step"), [(0, 0), (1, 0), (2, 3), (0, 5), (1, 7)])
def test_ctrl_c_inside_generate_leaves_the_model_and_the_cache_usable(selection, layer, step):
    options = SETTINGS[selection]
    model, ids = patch_model(tiny_model("llama"), 1.0, 0.7, **options), random_ids(2, LENGTH)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected, before = model.generate(ids, **settings), state_of(model)
    calls = []

    def interrupt(*_):
        calls.append(None)
        if len(calls) == step + 1:
            raise KeyboardInterrupt

    hook = model.model.layers[layer].mlp.register_forward_hook(interrupt)
    cache = DynamicCache()
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, past_key_values=cache, **settings)
    hook.remove()
    assert state_of(model) == before
    assert torch.equal(model.generate(ids, **settings), expected)
    held = min(layer_.get_seq_length() for layer_ in cache.layers) if len(cache.layers) == 3 else 0
    if layer < 2:
        with pytest.raises(BrokenCacheError):
            logits(model, ids[:, :1], copy.deepcopy(cache))
    if held:
        crop_layers(cache, held)
        assert torch.equal(model.generate(expected[:, : held + 1], past_key_values=cache, max_length=62), expected)
    else:
        cache.reset()
        assert torch.equal(model.generate(ids, past_key_values=cache, **settings), expected)


def test_layers_that_keep_no_keys_of_their_own_are_not_taken_for_broken_ones():
    # Two calls on one model without a cache, and with one that starts empty, and a prompt shorter than a window.
    for family in ("llama", "mistral", "gemma2", "gpt_oss"):
        model, ids = patch_model(tiny_model(family), 1.0, 0.7, selection="topk"), random_ids(2, 30)
        cache = DynamicCache(config=model.config)
        for piece in ids.split([3, 20, 1, 1, 5], 1):
            logits(model, piece, cache)
        logits(model, ids)

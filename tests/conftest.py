"""Shared pieces of the tests: no network, tiny models, and outputs poisoned before anything writes them."""

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from operations import INTERPRETED, device_of

from nc_patch import config
from nc_patch.config import DEFAULT_DENSE_BELOW


@pytest.fixture(autouse=True, scope="session")
def sparse_with_few_keys() -> Iterator[None]:
    """``dense_below`` is 0 where a test does not set it: tiny models see few keys, and would run dense throughout.

    Processes of their own and what is made while tests are collected have the real default, as has a test that takes
    ``dense_with_few_keys``.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(config._DEFAULTS, "dense_below", 0)
        yield


@pytest.fixture
def dense_with_few_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real default of ``dense_below``."""
    monkeypatch.setitem(config._DEFAULTS, "dense_below", DEFAULT_DENSE_BELOW)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ``torch.empty`` and ``new_empty`` returns NaN, so that an element nobody writes shows."""
    plain_empty, plain_new_empty, plain_like = torch.empty, torch.Tensor.new_empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(1)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(plain_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(plain_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(plain_new_empty(*a, **k)))


@pytest.fixture
def small_tiles(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter tiles are small, so that short inputs cross many; anywhere memory is poisoned."""
    if INTERPRETED:
        from interpreted import small_sizes

        small_sizes(monkeypatch)


@pytest.fixture
def device(small_tiles: None) -> str:
    """Where Triton's kernels run."""
    return device_of("triton")


# What takes longest, the longest first: begun last, one of them would keep one worker busy when the other is done.
LONGEST = ("interpreter", "smollm2", "gpu_check", "ways", "ways_compile", "attention", "wheel", "eval_sweep")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests that take ``device`` need a GPU, but in the interpreter; without one, what needs it is skipped."""
    if "device" in getattr(item, "fixturenames", ()) and not INTERPRETED:
        item.add_marker(pytest.mark.gpu)
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        item.add_marker(pytest.mark.skip(reason="needs a GPU that Triton supports"))


@pytest.fixture(scope="session")
def subword_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a tiny model of uneven attention with a tokenizer of subwords, which can read any text."""
    from tiny_models import tiny_model
    from tiny_sweep import tokenizer_of_kind

    directory, tokenizer = str(tmp_path_factory.mktemp("model")), tokenizer_of_kind("byte_bpe")
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 1100, "initializer_range": 0.3}
    tiny_model("llama", **shape, pad_token_id=None, bos_token_id=None).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def fixed_seed_and_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same random numbers every time; one thread, which is fastest on small tensors, except for real models."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    if request.node.get_closest_marker("slow") is None or "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def gpu_that_still_works() -> Iterator[None]:
    """Waits for the GPU, so that an access out of bounds fails the test that made it."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """Ends a process of xdist whose GPU no longer answers: xdist reports it and starts another for the other tests."""
    if torch.cuda.is_initialized() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)

"""Attention of loose tensors and settings, as tests call it: by an operation, an implementation, or in float64."""

from typing import Any

import pytest
import torch

from nc_patch import library
from nc_patch.ops import backends
from nc_patch.ops.means import PageMeans
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.reference import reference_attention as attention_over
from nc_patch.ops.rows import Rows
from nc_patch.selections import Block, Dense, Selection, TopK, Window
from nc_patch.selections.block.blocks import BlockChoice
from nc_patch.selections.block.definition import chosen_mask
from nc_patch.selections.block.pages import PageStatistics, summarize

# Whether kernels run in Triton's interpreter, which is settled when they are imported.
INTERPRETED = bool(backends._triton_interprets())


def on_kernel_device(test: Any) -> Any:
    """Marks a test that launches kernels: it runs in the interpreter, or on a GPU."""
    if INTERPRETED:
        return test
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that Triton supports")
    return pytest.mark.gpu(no_gpu(test))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """The same NaNs and infinities, and elsewhere a relative error of the norm below the tolerance."""
    actual = actual.double()
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[expected.isinf()], expected[expected.isinf()])
    finite = expected.isfinite()
    difference, size = (actual[finite] - expected[finite]).norm(), expected[finite].norm()
    assert difference <= tolerance * size, f"relative error {difference / size:.2e}"


def problem_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = 0.0,
    origin: torch.Tensor | None = None,
    **more: Any,
) -> Problem:
    """A problem; each sequence begins where its interval does, unless ``origin`` says otherwise."""
    origin = visible[..., 0] if origin is None else origin
    tensors = (query, key, value, visible.contiguous(), origin.contiguous(), budget.contiguous())
    return Problem(*tensors, scale=scale, softcap=softcap or 0.0, sinks=sinks, **more)


def selection_of(name: str, **options: Any) -> Selection:
    """The selection of a name with those of the options that it has; ``tail`` is whether page means count."""
    if name == "topk":
        tail = "mean" if options.get("tail") else "drop"
        return TopK(options.get("sink_keys", 0), options.get("recent_keys", 0), tail)
    if name == "window":
        return Window(options.get("sink_keys", 0))
    if name in ("block", "pages"):
        block = Block(**{name: options[name] for name in Block.options if name in options})
        object.__setattr__(block, "size", options.get("block_size", block.size))  # tests take smaller ones too
        return block
    return Dense()


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    visible: torch.Tensor,
    budget: torch.Tensor,
    selection: str,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    origin: torch.Tensor | None = None,
    choice: BlockChoice | None = None,
    **options: Any,
) -> AttentionResult:
    """Attention in float64, as a selection defines it; ``"pages"`` are blocks while decoding.

    With a ``choice`` the key blocks that it names are attended.
    """
    problem = problem_of(query, key, value, visible, budget, sinks, scale=scale, softcap=softcap, origin=origin)
    chosen = selection_of(selection, **options)
    if choice is not None:
        assert isinstance(chosen, Block)
        return attention_over(problem, chosen_mask(problem, choice, chosen))
    return chosen.reference(problem, decode=selection == "pages")


def summarize_pages(
    key: torch.Tensor, origin: torch.Tensor, end: torch.Tensor, first_page: torch.Tensor, pages: int, block_size: int
) -> PageStatistics:
    """Statistics of ``pages`` pages from ``first_page`` on, over those of their keys that exist.

    Args:
        key: ``[B, Hkv, N, D]``.
        origin: int ``[B]``, where each sequence begins; may be negative, keys before position 0 do not exist.
        end: int ``[B]``, where each sequence ends.
        first_page: int ``[B]``.

    Returns:
        Codes ``[B, Hkv, pages, 3, D]`` and scales ``[B, Hkv, pages, 3]``; zero for a page without keys.
    """
    B, Hkv, N, D = key.shape
    offset = torch.arange(pages * block_size, device=key.device)
    position = (origin.long() + first_page.long() * block_size)[:, None] + offset
    exists = (position >= 0) & (position < end.long().clamp(max=N)[:, None])
    index = position.clamp(0, max(N - 1, 0))[:, None, :, None].expand(-1, Hkv, -1, D)
    keys = key.gather(2, index).view(B, Hkv, pages, block_size, D)
    return summarize(keys, exists.view(B, 1, pages, block_size).expand(-1, Hkv, -1, -1))


def topk_mask(
    scores: torch.Tensor, visible: torch.Tensor, budget: torch.Tensor, sink_keys: int, recent_keys: int
) -> torch.Tensor:
    """Keys that ``topk`` attends by scores ``[B, H, Lq, Lk]``, bool of the same shape."""
    chosen = TopK(sink_keys, recent_keys, "drop")
    rows = (Rows(visible[b], budget[b], visible[b, :, 0], 0, 1) for b in range(len(scores)))
    return torch.stack([chosen.keep(each, of) for each, of in zip(scores, rows, strict=True)])


def implementation(
    selection: Selection, problem: Problem, backend: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, log-sum-exp and kept mass (or its bounds), empty where there are none, of one backend."""
    return three(selection.run(problem, backend))


def operation(selection: Selection, problem: Problem, backend: str = "torch") -> AttentionResult:
    """The same through the registered op, which has a gradient."""
    op = library.operation(selection, problem, backend)
    found = op(problem.tensors(), *library.arguments(selection, problem, backend))
    return AttentionResult(*(field if field.numel() else None for field in found))


def problem_of_case(case: Any, device: str = "cpu", **more: Any) -> Problem:
    """The problem of an ``attention_cases.Case``, on a device."""
    tensors = (case.query, case.key, case.value, case.visible, case.budget, case.sinks)
    moved = (None if t is None else t.to(device) for t in tensors)
    return problem_of(*moved, scale=case.scale, softcap=case.softcap, origin=case.origin.to(device), **more)


def run_blocks(
    case: Any, backend: str = "torch", device: str = "cpu", stats: bool = True, **options: Any
) -> AttentionResult:
    """Block attention of an ``attention_cases.Case``, with some of its settings changed."""
    problem = problem_of_case(case, device, stats=stats)
    return selection_of("block", **case.block_settings() | options).run(problem, backend)


def three(result: AttentionResult) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    nothing = result.output.new_empty(0, dtype=torch.float32)
    mass = result.kept_mass if result.kept_mass_bounds is None else result.kept_mass_bounds
    return result.output, nothing if result.lse is None else result.lse, nothing if mass is None else mass


Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def torch_topk_attention(
    *tensors: torch.Tensor | None,
    sink_keys: int,
    recent_keys: int,
    want_stats: bool,
    tail: PageMeans | None = None,
    **settings: Any,
) -> Three:
    """``topk`` in PyTorch, of what ``problem_of`` takes; with ``tail`` what is left out enters by these means."""
    problem = problem_of(*tensors, stats=want_stats, means=tail, **settings)  # type: ignore[arg-type]
    return implementation(TopK(sink_keys, recent_keys, "drop" if tail is None else "mean"), problem)


def torch_window_attention(
    *tensors: torch.Tensor | None, sink_keys: int, recent_keys: int = 0, want_stats: bool = False, **settings: Any
) -> Three:
    """``window`` in PyTorch; it has no ``recent_keys``."""
    problem = problem_of(*tensors, stats=want_stats, **settings)  # type: ignore[arg-type]
    return implementation(Window(sink_keys), problem)

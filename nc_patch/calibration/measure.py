"""One piece of text through a model, and exact rows of its attention: what one query puts on each key it sees.

Rows are taken a few at a time, so that memory is O(rows * keys), never Lq * Lk.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from nc_patch.common import ProfileError
from nc_patch.layers import Observed
from nc_patch.ops import rows as score_rows
from nc_patch.patch import model_shape, observed
from nc_patch.selections import TopK

# Gradients keep the activations of every layer, so they are taken on the beginning of a piece.
GRADIENT_LENGTH = 1024
SMALLEST_KEYS = 8
_PROBES = 2  # random directions along which the error of an output is measured
_ROUNDING = 1e-6  # by which a sum of float32 weights may fall short of 1 - eps
_TOPK = TopK()  # curves are of what it attends by default


@dataclass(frozen=True)
class Plan:
    """What is measured on each piece of text: so many rows just before each of the ascending lengths.

    The keys that hold all but a share of the mass are counted for each of the ascending ``eps``.
    """

    lengths: tuple[int, ...]
    rows: int
    eps: tuple[float, ...]
    seed: int = 0

    @property
    def keys(self) -> tuple[int, ...]:
        """The numbers of keys at which curves are taken: in steps of about sqrt(2) up to the longest length."""
        grid = [SMALLEST_KEYS]
        while grid[-1] < self.lengths[-1]:
            grid.append(round(SMALLEST_KEYS * 2 ** (len(grid) / 2)))
        return tuple(grid)

    def positions(self, length: int) -> torch.Tensor:
        """The queries whose rows are taken for a length, int64 ``[rows]``, in the last eighth before it."""
        first = length - max(min(self.rows, length), length // 8)
        return torch.linspace(first, length - 1, self.rows, dtype=torch.float32, device="cpu").round().long()


class Piece(NamedTuple):
    """What one piece of text gave; L lengths, M layers, H query heads, R rows, G numbers of keys, E shares.

    ``visible`` int32 ``[L, M, R]`` and ``support`` int32 ``[E, L, M, H, R]`` are as in ``RowCurves``; ``kept`` and
    ``error`` float32 ``[L, M, H, G]`` means over rows of the mass kept and of the output error's squared norm; ``loss``
    float32 ``[L', M, H, G]``, for lengths up to ``GRADIENT_LENGTH``, nats per token that this error adds: half its mean
    square along the loss's gradient for tokens that the model draws (the Fisher information).
    """

    visible: np.ndarray
    support: np.ndarray
    kept: np.ndarray
    error: np.ndarray
    loss: np.ndarray


def measure_piece(model: Any, ids: Sequence[int], plan: Plan, on_layer: Callable[[], Any] = lambda: None) -> Piece:
    """What the attention of a model holds on a piece of text, from a dense pass and one with gradients.

    There are as many ``ids`` as the longest length; ``on_layer`` is called after each layer of each of the two passes.
    The model is left as it was. Raises ProfileError where the attention holds NaN or Inf.
    """
    (M, H), L, R, G = model_shape(model), len(plan.lengths), plan.rows, len(plan.keys)
    beginning = [n for n in plan.lengths if n <= max(GRADIENT_LENGTH, plan.lengths[0])]
    piece = Piece(
        np.zeros((L, M, R), np.int32),
        np.zeros((len(plan.eps), L, M, H, R), np.int32),
        *(np.full((levels, M, H, G), np.nan, np.float32) for levels in (L, L, len(beginning))),
    )

    @torch.no_grad()
    def see(call: Observed, gradient: torch.Tensor | None = None) -> None:
        """Along random directions; or along the loss's gradient, of the beginning of the piece."""
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + call.layer)
        for level, length in enumerate(plan.lengths if gradient is None else beginning):
            rows = plan.positions(length).to(call.output.device)
            if gradient is None:
                shape = (_PROBES, H, R, call.problem.value.shape[-1])
                probes = torch.randn(shape, generator=generator, device="cpu")
            else:
                probes = gradient[:, :, rows].float()
            found = row_curves(call, rows, plan.keys, plan.eps, probes)
            error = found.error.double().mean(-1).T.cpu()
            if gradient is not None:
                piece.loss[level, call.layer] = error / 2
                continue
            piece.error[level, call.layer] = error / _PROBES
            piece.kept[level, call.layer] = found.kept.double().mean(-1).T.cpu()
            piece.visible[level, call.layer] = found.visible.cpu()
            piece.support[:, level, call.layer] = found.support.cpu()
        on_layer()

    def await_gradient(call: Observed) -> None:
        call.output.register_hook(lambda gradient: see(call, gradient))

    tokens = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
    short = tokens[:, : beginning[-1]]
    with torch.inference_mode(False), evaluating(model):
        with torch.no_grad(), observed(model, see):
            options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
            model(input_ids=tokens, use_cache=False, **options)
        with torch.enable_grad(), observed(model, await_gradient):
            loss_of_drawn_tokens(model(input_ids=short, use_cache=False).logits, plan.seed).backward()
    if not all(np.isfinite(values).all() for values in piece):
        raise ProfileError("the model's attention holds NaN or Inf on this text: try another dtype, such as float32")
    return piece


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, with gradients from its embeddings on but of no parameter; then as it was."""
    before = [(module, "training", module.training) for module in model.modules()]
    before += [(parameter, "requires_grad", parameter.requires_grad) for parameter in model.parameters()]
    start = lambda module, arguments, output: output.detach().requires_grad_()  # noqa: E731
    hook = model.get_input_embeddings().register_forward_hook(start)
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        hook.remove()
        for holder, name, value in before:
            setattr(holder, name, value)


def loss_of_drawn_tokens(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """The summed loss of tokens that the model's own distributions draw."""
    scores = logits[0].float()
    with torch.no_grad():
        # torch.multinomial takes seconds for so many rows.
        generator = torch.Generator().manual_seed(seed)
        level = torch.rand(len(scores), 1, generator=generator, dtype=torch.float32, device="cpu").to(scores.device)
        reached = torch.softmax(scores, -1).cumsum_(-1)
        drawn = torch.searchsorted(reached, level * reached[:, -1:])[:, 0].clamp(max=scores.shape[-1] - 1)
    return torch.nn.functional.cross_entropy(scores, drawn, reduction="sum")


class RowCurves(NamedTuple):
    """What rows of one layer hold; H query heads, R rows, G numbers of keys, E shares of the mass.

    ``visible`` int64 ``[R]`` is how many keys each row sees; ``support`` int32 ``[E, H, R]`` the smallest number of
    keys that hold the share 1 - eps of the softmax mass; ``kept`` float32 ``[G, H, R]`` the mass of the keys that top-k
    attends with each number of keys; ``error`` float32 ``[G, H, R]`` the square of the output's difference from the
    dense one, summed over the probes along which it is taken.
    """

    visible: torch.Tensor
    support: torch.Tensor
    kept: torch.Tensor
    error: torch.Tensor


def row_curves(
    call: Observed, rows: torch.Tensor, keys: Sequence[int], eps: Sequence[float], probes: torch.Tensor
) -> RowCurves:
    """The curves of rows of a call of one sequence, exact but for the rounding of float32 scores.

    ``rows`` int64 ``[R]`` are queries that see at least one key, ``keys`` ascending numbers from ``SMALLEST_KEYS`` on,
    ``eps`` shares of the mass that may be missing, ``probes`` float32 ``[P, H, R, Dv]`` directions of the output.
    """
    problem = call.problem
    rows, probes = rows.to(problem.query.device), probes.to(problem.query.device)
    step = score_rows.rows_per_block(problem.query.shape[1], problem.key.shape[2])
    if len(rows) > step:
        blocks = zip(rows.split(step), probes.split(step, 2), strict=True)
        parts = [row_curves(call, some, keys, eps, along) for some, along in blocks]
        return RowCurves(*(torch.cat(tensors, -1) for tensors in zip(*parts, strict=True)))
    seen = problem.visible[0, rows]
    low, high = int(seen[:, 0].min()), int(seen[:, 1].max())
    key, value = (tensor[0, :, low:high].detach().float() for tensor in (problem.key, problem.value))
    position = torch.arange(low, high, device=seen.device, dtype=torch.int32)
    scores = score_rows.scores_of(problem.query[0, :, rows].detach().float(), key)
    scores = score_rows.hide_unseen_(score_rows.final_scores_(scores, problem.scale, problem.softcap), seen, position)
    # What a learned sink adds to the denominator, in units of the mass of the keys.
    sink: float | torch.Tensor = 0.0
    if problem.sinks is not None:
        sink = torch.exp(problem.sinks.detach().float()[:, None] - torch.logsumexp(scores, -1))[None]
    weights = torch.softmax(scores, -1)
    mass = weights.sort(-1, descending=True).values.cumsum(-1, dtype=torch.float64)
    support = torch.stack([(mass < 1 - share - _ROUNDING).sum(-1) + 1 for share in eps])

    # Top-k attends its first and recent keys, and then the heaviest of the others; of equal ones the first.
    forced = (position < seen[:, :1] + _TOPK.sink_keys) | (position >= seen[:, 1:] - _TOPK.recent_keys)
    forced &= (position >= seen[:, :1]) & (position < seen[:, 1:])
    order = (weights + forced).sort(dim=-1, descending=True, stable=True).indices
    last = torch.tensor(keys, device=order.device).clamp(max=order.shape[-1]) - 1

    def held(parts: torch.Tensor) -> torch.Tensor:
        """Sums of parts ``[H, R, N]`` over what each number of keys attends, ``[G, H, R]``."""
        return parts.gather(-1, order).cumsum(-1, dtype=torch.float64)[..., last].movedim(-1, 0)

    kept = held(weights)
    error = torch.zeros_like(kept)
    for probe in probes:
        along = weights * score_rows.scores_of(probe, value)
        dense = along.sum(-1, dtype=torch.float64)
        error += (held(along) / (kept + sink) - dense / (1.0 + sink)).square()
    visible = (seen[:, 1] - seen[:, 0]).long()
    return RowCurves(visible, support.to(torch.int32), kept.clamp(max=1.0).float(), error.float())

"""One piece of text through a model, and what its attention held: the measurement that calibration repeats."""

import contextlib
import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nc_patch.common import ProfileError
from nc_patch.curves import RowCurves, key_grid, row_curves
from nc_patch.observed import Observed
from nc_patch.patch import model_shape, observed

# Gradients need the activations of every layer, so they are taken on the beginning of a piece.
GRADIENT_LENGTH = 1024
# Random directions along which the error of an output is measured; rows and pieces average it further.
_PROBES = 2
# Rows of a length lie in the last eighth before it.
_SPAN = 8


@dataclass(frozen=True)
class Plan:
    """What is measured on each piece of text.

    Attributes:
        lengths: numbers of tokens, ascending; rows are taken just before each.
        rows: how many rows at each length.
        eps: shares of the mass, ascending, for which the keys that hold all the rest are counted.
        seed: of random directions and sampled tokens.
    """

    lengths: tuple[int, ...]
    rows: int
    eps: tuple[float, ...]
    seed: int = 0

    @property
    def keys(self) -> tuple[int, ...]:
        """The numbers of keys at which curves are taken."""
        return key_grid(self.lengths[-1])

    @property
    def gradient_lengths(self) -> tuple[int, ...]:
        """The lengths at which the effect of an error on the loss is measured: those up to ``GRADIENT_LENGTH``."""
        return tuple(n for n in self.lengths if n <= max(GRADIENT_LENGTH, self.lengths[0]))

    def positions(self, length: int) -> torch.Tensor:
        """The queries whose rows are taken for a length, int64 ``[rows]``."""
        first = length - max(min(self.rows, length), length // _SPAN)
        return torch.linspace(first, length - 1, self.rows, dtype=torch.float32).round().long()


@dataclass(frozen=True)
class Piece:
    """What one piece of text gave; L lengths, M layers, H query heads, R rows, G numbers of keys, E shares.

    Attributes:
        visible: int32 ``[L, M, R]``, keys that each row sees.
        support: int32 ``[E, L, M, H, R]``, keys that hold 1 - eps of each row's mass.
        kept: float32 ``[L, M, H, G]``, mean mass kept by each number of keys.
        error: float32 ``[L, M, H, G]``, mean squared norm of the output's error.
        loss: float32 ``[L', M, H, G]`` for the first L' lengths, the loss in nats per token that this error is
            expected to add: half its mean square along the loss's gradient for tokens that the model itself draws (the
            Fisher information as the Hessian).
    """

    visible: np.ndarray
    support: np.ndarray
    kept: np.ndarray
    error: np.ndarray
    loss: np.ndarray


def measure_piece(model: Any, ids: Sequence[int], plan: Plan, on_layer: Callable[[], None] = lambda: None) -> Piece:
    """Runs a piece of text through a model, densely, and takes its attention's rows on the way.

    The model is left as it was: its patch, its training modes and its parameters' ``requires_grad``.

    Args:
        model: a causal language model that ``patch_model`` takes.
        ids: tokens, as many as the longest length.
        plan: what to measure.
        on_layer: called after each layer of each of the two passes.
    """
    layers, heads = model_shape(model)
    recorder = _Recorder(plan, layers, heads, on_layer)
    tokens = torch.tensor([list(ids)], device=_input_device(model))
    with torch.inference_mode(False), _evaluating(model):
        with torch.no_grad(), observed(model, recorder.see):
            _forward(model, tokens, keep=1)
        if plan.gradient_lengths:
            short = tokens[:, : plan.gradient_lengths[-1]]
            with torch.enable_grad(), observed(model, recorder.see_gradient), _from_embeddings(model):
                logits = _forward(model, short, keep=None)
                _loss_of_drawn_tokens(logits, plan.seed).backward()
    return recorder.piece()


class _Recorder:
    """Takes in the calls of all layers."""

    def __init__(self, plan: Plan, layers: int, heads: int, on_layer: Callable[[], None]) -> None:
        L, E, G, R = len(plan.lengths), len(plan.eps), len(plan.keys), plan.rows
        self._plan, self._on_layer = plan, on_layer
        self._missing = {"dense": set(range(layers)), "gradient": set(range(layers))}
        self._visible = np.zeros((L, layers, R), dtype=np.int32)
        self._support = np.zeros((E, L, layers, heads, R), dtype=np.int32)
        self._kept = np.zeros((L, layers, heads, G), dtype=np.float32)
        self._error = np.zeros((L, layers, heads, G), dtype=np.float32)
        self._loss = np.zeros((len(plan.gradient_lengths), layers, heads, G), dtype=np.float32)

    def see(self, call: Observed) -> None:
        """One layer of the dense pass."""
        generator = torch.Generator().manual_seed(self._plan.seed * 1_000_003 + call.layer)
        heads, head_dim = call.query.shape[1], call.value.shape[-1]
        for level, length in enumerate(self._plan.lengths):
            probes = torch.randn(_PROBES, heads, self._plan.rows, head_dim, generator=generator)
            found = self._curves(call, length, probes.to(call.query.device))
            self._visible[level, call.layer] = found.visible.cpu().numpy()
            self._support[:, level, call.layer] = found.support.cpu().numpy()
            self._kept[level, call.layer] = found.kept.double().mean(-1).T.cpu().numpy()
            self._error[level, call.layer] = found.error.double().mean(-1).T.cpu().numpy() / _PROBES
        self._missing["dense"].discard(call.layer)
        self._on_layer()

    def see_gradient(self, call: Observed) -> None:
        """One layer of the pass with gradients; the work is done on the way back."""
        if not call.output.requires_grad:
            raise RuntimeError(f"no gradient reaches the attention of layer {call.layer}")
        call.output.register_hook(lambda gradient: self._along(call, gradient))

    def _along(self, call: Observed, gradient: torch.Tensor) -> None:
        with torch.no_grad():
            for level, length in enumerate(self._plan.gradient_lengths):
                rows = self._plan.positions(length).to(gradient.device)
                found = self._curves(call, length, gradient[:, :, rows].float())
                self._loss[level, call.layer] = found.error.double().mean(-1).T.cpu().numpy() / 2
        self._missing["gradient"].discard(call.layer)
        self._on_layer()

    def _curves(self, call: Observed, length: int, probes: torch.Tensor) -> RowCurves:
        rows = self._plan.positions(length).to(call.query.device)
        return row_curves(call, rows, self._plan.keys, self._plan.eps, probes)

    def piece(self) -> Piece:
        """What was recorded, once every layer was seen in both passes."""
        for what, layers in self._missing.items():
            if layers and (what == "dense" or self._loss.size):
                raise RuntimeError(f"the {what} pass did not show the attention of the layers {sorted(layers)}")
        for name in ("_kept", "_error", "_loss"):
            if not np.isfinite(getattr(self, name)).all():
                raise ProfileError(
                    "the model's attention holds NaN or Inf on this text: try another dtype, for example float32"
                )
        return Piece(self._visible, self._support, self._kept, self._error, self._loss)


def _forward(model: Any, tokens: torch.Tensor, keep: int | None) -> torch.Tensor:
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": keep} if keep is not None and takes else {}
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False, **options).logits
    return logits


def _loss_of_drawn_tokens(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """The summed loss of tokens that the model's own distributions draw."""
    scores = logits[0].float()
    with torch.no_grad():
        # torch.multinomial takes seconds for so many rows of a whole vocabulary.
        generator = torch.Generator().manual_seed(seed)
        level = torch.rand(len(scores), 1, generator=generator, dtype=torch.float32).to(scores.device)
        reached = torch.softmax(scores, -1).cumsum_(-1)
        drawn = torch.searchsorted(reached, level * reached[:, -1:])[:, 0].clamp(max=scores.shape[-1] - 1)
    return torch.nn.functional.cross_entropy(scores, drawn, reduction="sum")


def _input_device(model: Any) -> torch.device:
    device: torch.device = model.get_input_embeddings().weight.device
    return device


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode and its parameters without gradients, and afterwards as they were."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def _from_embeddings(model: Any) -> Iterator[None]:
    """Gradients start at the embeddings of the tokens."""
    start = lambda module, arguments, output: output.detach().requires_grad_()  # noqa: E731
    hook = model.get_input_embeddings().register_forward_hook(start)
    try:
        yield
    finally:
        hook.remove()


def piece_name(fingerprint: str, ids: Sequence[int], plan: Plan) -> str:
    """The name of the file that keeps a piece: equal for equal weights, tokens and plan."""
    digest = hashlib.sha256(repr((fingerprint, [int(i) for i in ids], sorted(asdict(plan).items()))).encode())
    return f"piece-{digest.hexdigest()[:20]}.npz"


def save_piece(path: Path, piece: Piece) -> None:
    """Writes a piece so that an interruption leaves the whole of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".piece-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez_compressed(file, **asdict(piece))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def load_piece(path: Path, plan: Plan, layers: int, heads: int) -> Piece | None:
    """The piece that a file keeps, or None where there is no file.

    Raises:
        ProfileError: the file is damaged, or of another shape.
    """
    if not path.exists():
        return None
    L, E, G, R, M, H = len(plan.lengths), len(plan.eps), len(plan.keys), plan.rows, layers, heads
    shapes = {
        "visible": (L, M, R),
        "support": (E, L, M, H, R),
        "kept": (L, M, H, G),
        "error": (L, M, H, G),
        "loss": (len(plan.gradient_lengths), M, H, G),
    }
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in shapes}
    except Exception as error:  # zipfile, zlib and numpy raise their own, and all of them mean the same
        raise ProfileError(f"{path} is damaged ({type(error).__name__}); remove it to measure it again") from error
    for name, shape in shapes.items():
        if arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
            raise ProfileError(f"{path} is damaged ({name} {arrays[name].shape}); remove it to measure it again")
    return Piece(**arrays)


def total_steps(plan: Plan, layers: int, pieces: int) -> int:
    """How often ``on_layer`` will be called for so many pieces."""
    return pieces * layers * (2 if plan.gradient_lengths else 1)

"""``calibrate``: how sparse each head of a model is on real text, and the budgets that follow."""

import hashlib
import platform
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from nc_patch.common import ProfileError, as_integer, as_number, check_directory
from nc_patch.families import attention_modules
from nc_patch.fingerprint import weights_fingerprint
from nc_patch.fits import fit_power_laws
from nc_patch.patch import model_shape
from nc_patch.profile import Fit, Profile, checked_layers, significant
from nc_patch.recording import Piece, Plan, load_piece, measure_piece, piece_name, save_piece, total_steps
from nc_patch.version import __version__

DEFAULT_LENGTHS = (256, 512, 1024, 2048, 4096)
DEFAULT_EPS = (0.02, 0.05, 0.1, 0.2)
DEFAULT_TARGET = 0.95
DEFAULT_PIECES = 3
DEFAULT_ROWS = 24
# Below so many tokens a length says little about how keys grow.
SHORTEST = 16
# An error's size must be at least this share of that with the fewest keys to tell what it costs.
_MEASURABLE = 1e-2
# Intervals of log alpha end here, where they say nothing any more.
_WIDEST = 25.0


def calibrate(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str] | Sequence[Sequence[int]],
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    target: float = DEFAULT_TARGET,
    *,
    eps: Sequence[float] = DEFAULT_EPS,
    pieces: int = DEFAULT_PIECES,
    rows: int = DEFAULT_ROWS,
    dense_layers: Sequence[int] = (),
    directory: str | Path | None = None,
    name: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Profile:
    """Measures on real text how many keys each layer and query head needs, and makes a ``Profile`` of it.

    Every piece of text, as long as the longest length, goes through the model once, densely, while exact rows of its
    attention just before each length are taken; and its beginning a second time, backwards too, for what an error of
    each head does to the loss. The model is left as it was, whatever happens.

    With ``torch.distributed`` initialised (``accelerate launch``, ``torchrun``) the processes share the pieces, and
    each returns the same profile.

    Args:
        model: a causal language model that ``patch_model`` takes.
        tokenizer: of the model; None where ``texts`` are tokens.
        texts: texts, or lists of token ids; the pieces are taken evenly from all of them, and do not overlap.
        lengths: at least two numbers of tokens.
        target: share of the softmax mass that the laws of the profile are for; see ``Profile.at_mass``.
        eps: shares of the mass that may be missing, for each of which a power law is fitted; 1 - target joins them.
        pieces: how many pieces of text. Intervals rest on their differences: with one they say nothing of other texts.
        rows: how many rows at each length of each piece.
        dense_layers: layers that stay dense.
        directory: where each finished piece is kept, so that a run that was stopped goes on; None to keep none.
        name: of the model, for the record; None for the model's own.
        seed: of random numbers.
        progress: whether a bar shows how far it is.

    Raises:
        ProfileError: no text, a text shorter than the longest length, fewer than two lengths, another value out of its
            range, or a directory that cannot be written.
        UnsupportedModelError: the model cannot be patched.
    """
    plan = _plan(lengths, rows, eps, target, seed)
    layers, _ = model_shape(model)
    without = sorted(set(range(layers)) - {layer for layer, _ in attention_modules(model)})
    if without:
        raise ProfileError(
            f"the layers {without} of {type(model).__name__} have no attention that can be patched, and a profile "
            "needs it in every layer. Give alpha and C to patch_model instead."
        )
    _check_positions(model, plan.lengths[-1])
    dense_layers = checked_layers(dense_layers, layers)
    ids = cut_pieces(tokenizer, texts, plan.lengths[-1], _positive("pieces", pieces))
    if directory is not None:
        try:
            check_directory(Path(directory))
        except OSError as error:
            raise ProfileError(f"the directory {directory} cannot be written: {error.strerror}") from error
    fingerprint = weights_fingerprint(model)
    found = _all_pieces(model, ids, plan, fingerprint, None if directory is None else Path(directory), progress)
    profile = _profile(found, plan, fingerprint, ids, model, name)
    return profile.at_mass(target, dense_layers=dense_layers)


def cut_pieces(tokenizer: Any, texts: Sequence[Any], length: int, pieces: int) -> list[list[int]]:
    """Token ids of ``pieces`` stretches of ``length`` tokens that do not overlap, taken in turn from all texts.

    What the tokenizer puts before a text (a BOS token) stands before each stretch.

    Raises:
        ProfileError: there is no text, or it is too short.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise ProfileError(f"texts must be a list of texts or of token ids, got {type(texts).__name__}")
    if not len(texts):
        raise ProfileError("there is no text to calibrate on: give at least one, or lists of token ids")
    slots: list[list[list[int]]] = []
    short = []
    for number, text in enumerate(texts):
        prefix, body = _tokens(tokenizer, text, number)
        room = length - len(prefix)
        count = len(body) // room if room > 0 else 0
        if not count:
            short.append(f"text {number} has {len(body) + len(prefix):,} tokens")
        slots.append([[*prefix, *body[i * room : (i + 1) * room]] for i in range(count)])
    if short:
        raise ProfileError(
            f"{', '.join(short[:3])}, and the longest length is {length:,}: give longer texts or shorter lengths"
        )
    total = sum(len(of_text) for of_text in slots)
    if total < pieces:
        raise ProfileError(
            f"the texts hold {total} pieces of {length:,} tokens, and {pieces} are asked for: give more text, shorter "
            "lengths or fewer pieces"
        )
    shares = [0] * len(slots)
    while sum(shares) < pieces:
        for number, of_text in enumerate(slots):
            if sum(shares) < pieces and shares[number] < len(of_text):
                shares[number] += 1
    chosen = []
    for of_text, share in zip(slots, shares, strict=True):
        places = np.linspace(0, len(of_text) - 1, share).round().astype(int) if share > 1 else [0][:share]
        chosen += [of_text[place] for place in places]
    return chosen


def _tokens(tokenizer: Any, text: Any, number: int) -> tuple[list[int], list[int]]:
    """What comes before every text, and a text's own tokens."""
    if not isinstance(text, str):
        try:
            ids = [int(i) for i in text]
        except (TypeError, ValueError) as error:
            raise ProfileError(f"text {number} is neither a text nor token ids: {error}") from error
        return [], ids
    if tokenizer is None:
        raise ProfileError(f"text {number} is a text, which needs a tokenizer; pass one, or token ids")
    if not text.strip():
        raise ProfileError(f"text {number} is empty")
    plain = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    probe = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    with_special = list(tokenizer("a", verbose=False)["input_ids"])
    starts = (i for i in range(len(with_special)) if with_special[i : i + len(probe)] == probe)
    return with_special[: next(starts, 0)], plain


def _all_pieces(
    model: Any, ids: list[list[int]], plan: Plan, fingerprint: str, directory: Path | None, progress: bool
) -> list[Piece]:
    """The measured pieces in their order; each is measured by one process, and all of them get it."""
    shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
    error: Exception | None = None
    own: dict[int, Piece] = {}
    try:
        own = dict(_own_pieces(model, ids, plan, fingerprint, directory, progress and rank == 0, rank, world))
    except Exception as caught:  # the others wait for this process, and must hear of it
        if not shared:
            raise
        error = caught
    if not shared:
        return [own[number] for number in range(len(ids))]
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, own if error is None else f"{type(error).__name__}: {error}")
    failed = [f"process {number}: {part}" for number, part in enumerate(gathered) if isinstance(part, str)]
    if error is not None:
        raise error
    if failed:
        raise ProfileError(f"calibration ended, because another process failed: {'; '.join(failed)}")
    every = {number: piece for part in gathered for number, piece in part.items()}
    return [every[number] for number in range(len(ids))]


def _own_pieces(
    model: Any,
    ids: list[list[int]],
    plan: Plan,
    fingerprint: str,
    directory: Path | None,
    progress: bool,
    rank: int,
    world: int,
) -> Iterator[tuple[int, Piece]]:
    layers, heads = model_shape(model)
    own = range(rank, len(ids), world)
    steps = total_steps(plan, layers, 1)
    with tqdm(total=len(own) * steps, desc="calibrating", unit="layer", disable=not progress) as bar:
        for number in own:
            path = None if directory is None else directory / piece_name(fingerprint, ids[number], plan)
            piece = None if path is None else load_piece(path, plan, layers, heads)
            if piece is None:
                piece = measure_piece(model, ids[number], plan, lambda: bar.update() and None)
                if path is not None:
                    save_piece(path, piece)
            else:
                bar.update(steps)
            yield number, piece


def _profile(
    found: list[Piece], plan: Plan, fingerprint: str, ids: list[list[int]], model: Any, name: str | None
) -> Profile:
    visible = np.stack([piece.visible for piece in found]).astype(float)  # [P, L, M, R]
    log_n = np.log(visible).mean((0, 3))
    most = visible.max((0, 1, 3))
    kept, error = (np.mean([getattr(p, part) for p in found], 0, dtype=float) for part in ("kept", "error"))
    loss = np.mean([piece.loss for piece in found], 0, dtype=float)
    digest = hashlib.sha256(np.array(ids, dtype=np.int64).tobytes()).hexdigest()
    M, H = kept.shape[1:3]
    return Profile(
        model=(name or str(getattr(model.config, "_name_or_path", "")) or type(model).__name__)[:4096],
        model_class=type(model).__name__,
        fingerprint=fingerprint,
        texts=digest,
        pieces=len(found),
        lengths=plan.lengths,
        visible=significant(np.exp(log_n)),
        windows=tuple(int(n) if n < plan.lengths[-1] else 0 for n in most),
        keys=plan.keys,
        kept=significant(np.clip(kept, 0.0, 1.0), 5),
        error=significant(error, 5),
        sensitivity=significant(_sensitivity(loss, error, visible.mean((0, 3)), np.array(plan.keys))),
        fits=tuple(_fit(number, found, plan, log_n) for number in range(len(plan.eps))),
        alpha=np.ones((M, H)),
        C=np.ones((M, H)),
        aim="dense",
        versions={
            "nc_patch": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    )


def _fit(number: int, found: list[Piece], plan: Plan, log_n: np.ndarray) -> Fit:
    log_k = np.log(np.stack([piece.support[number] for piece in found]).astype(float))
    laws = fit_power_laws(log_n, log_k, plan.seed)
    # log alpha is the level at the middle minus C times the middle, so its error has both.
    alpha_half = np.sqrt(laws.level_half**2 + (laws.C_half * laws.middle[:, None]) ** 2)
    arrays = {
        "alpha": np.exp(laws.log_alpha),
        "alpha_low": np.exp(np.maximum(laws.log_alpha - alpha_half, -_WIDEST)),
        "alpha_high": np.exp(np.minimum(laws.log_alpha + alpha_half, _WIDEST)),
        "C": laws.C,
        "C_low": np.clip(laws.C - laws.C_half, 0.0, 1.0),
        "C_high": np.clip(laws.C + laws.C_half, 0.0, 1.0),
        "r2": laws.r2,
        "level_half": laws.level_half,
        "support": np.exp(log_k.mean((0, 4))),
    }
    return Fit(eps=plan.eps[number], **{name: significant(values) for name, values in arrays.items()})


def _sensitivity(loss: np.ndarray, error: np.ndarray, visible: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Loss per unit of error of each head ``[M, H]``: the mean ratio over lengths and numbers of keys.

    The ratio hardly depends on either, so that few rows suffice. It is taken where some keys are left out and the error
    is large enough to be measured.
    """
    error, visible = error[: len(loss)], visible[: len(loss), :, None, None]
    usable = (keys < visible) & (error > _MEASURABLE * error[..., :1]) & (error > 0)
    ratio = np.where(usable, loss / np.where(usable, error, 1.0), 0.0)
    return np.asarray(ratio.sum((0, 3)) / np.maximum(usable.sum((0, 3)), 1))


def _plan(lengths: Sequence[int], rows: int, eps: Sequence[float], target: float, seed: int) -> Plan:
    several = isinstance(lengths, Iterable) and not isinstance(lengths, str)
    given = [as_integer(n) for n in lengths] if several else [None]
    if None in given:
        raise ProfileError(f"lengths must be a list of numbers of tokens, got {lengths!r}")
    ordered = tuple(sorted({n for n in given if n is not None}))
    if len(ordered) < 2:
        raise ProfileError(
            f"a law needs at least two different lengths, got {list(lengths)}; for example {list(DEFAULT_LENGTHS)}"
        )
    if ordered[0] < SHORTEST:
        raise ProfileError(f"lengths must be at least {SHORTEST} tokens, got {ordered[0]}")
    aim, *left_out = (_share("target", target), *(_share("eps", share) for share in eps))
    shares = tuple(sorted({round(share, 9) for share in (*left_out, 1 - aim)}))
    number = as_integer(seed)
    if number is None:
        raise ProfileError(f"seed must be an integer, got {seed!r}")
    return Plan(ordered, _positive("rows", rows), shares, number)


def _share(name: str, value: Any) -> float:
    found = as_number(value)
    if found is None or not 0 < found < 1:
        raise ProfileError(f"{name} must be a number in (0, 1), got {value!r}")
    return float(found)


def _check_positions(model: Any, longest: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ProfileError(f"length {longest:,} is beyond the {positions:,} positions of the model; leave it out")


def _positive(name: str, value: Any) -> int:
    found = as_integer(value)
    if found is None or found < 1:
        raise ProfileError(f"{name} must be a positive integer, got {value!r}")
    return found

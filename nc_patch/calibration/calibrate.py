"""``calibrate``: how sparse each head of a model is on real text, and the budgets that follow."""

import hashlib
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from nc_patch.calibration.fingerprint import weights_fingerprint
from nc_patch.calibration.fit import fit_power_laws, significant
from nc_patch.calibration.measure import Piece, Plan, measure_piece
from nc_patch.calibration.profile import Profile, checked_count, checked_share
from nc_patch.common import ProfileError, as_integer, plain, shown
from nc_patch.families import attention_modules
from nc_patch.patch import model_shape
from nc_patch.version import __version__

DEFAULT_LENGTHS = (256, 512, 1024, 2048, 4096)
DEFAULT_EPS = (0.02, 0.05, 0.1, 0.2)
DEFAULT_TARGET = 0.95
DEFAULT_PIECES = 3
DEFAULT_ROWS = 24
SHORTEST = 16  # a shorter length says little about how keys grow
_MEASURABLE = 1e-2  # the share of the error with the fewest keys below which an error does not tell what it costs


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
    seed: int = 0,
) -> Profile:
    """Measures on real text how many keys each layer and query head needs, and makes a ``Profile`` of it.

    docs/calibration.md says how. The model is left as it was. With ``torch.distributed`` initialised the processes
    share the pieces, and each returns the same profile.

    Args:
        model: a causal language model that ``patch_model`` takes.
        tokenizer: of the model; None where ``texts`` are lists of token ids.
        texts: the pieces are taken evenly from all of them, and do not overlap.
        lengths: at least two numbers of tokens; a piece is as long as the longest.
        target: share of the softmax mass that the laws of the profile are for; see ``Profile.at_mass``.
        eps: shares of the mass that may be missing, for each of which a power law is fitted; 1 - target joins them.
        pieces: of text. Intervals rest on their differences: with one they say nothing of other texts.
        rows: taken at each length of each piece.
        seed: of random numbers.

    Raises:
        ProfileError: no text, a text shorter than the longest length, or a value out of its range.
        UnsupportedModelError: the model cannot be patched.
    """
    given = plain(lengths)
    ordered = sorted({as_integer(n) or 0 for n in (given if isinstance(given, Iterable) else ())})
    if len(ordered) < 2 or ordered[0] < SHORTEST:
        raise ProfileError(
            f"lengths must be a list of at least two different numbers of tokens, each at least {SHORTEST}, got "
            f"{lengths!r}; for example {list(DEFAULT_LENGTHS)}"
        )
    missing = [checked_share("eps", share) for share in eps]
    missing.append(1 - checked_share("target", target))
    shares = tuple(sorted({round(share, 9) for share in missing}))
    plan = Plan(tuple(ordered), checked_count("rows", rows), shares, checked_count("seed", seed, least=0))
    without = sorted(set(range(model_shape(model)[0])) - {layer for layer, _ in attention_modules(model)})
    if without:
        raise ProfileError(
            f"the layers {without} of {type(model).__name__} have no attention that can be patched, and a profile "
            "needs it in every layer. Give alpha and C to patch_model instead."
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and ordered[-1] > positions:
        raise ProfileError(f"length {ordered[-1]:,} is beyond the {positions:,} positions of the model; leave it out")
    ids = cut_pieces(tokenizer, texts, ordered[-1], checked_count("pieces", pieces))
    return _profile(_measured(model, ids, plan), plan, ids, model).at_mass(target)


def cut_pieces(tokenizer: Any, texts: Sequence[Any], length: int, pieces: int) -> list[list[int]]:
    """Token ids of ``pieces`` stretches of ``length`` tokens that do not overlap, taken in turn from all texts.

    What the tokenizer puts before a text (a BOS token) stands before each. Raises ProfileError where text is too short.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not len(texts):
        raise ProfileError(f"texts must be a list of at least one text, or list of token ids, got {shown(texts)}")
    slots: list[list[list[int]]] = []
    for number, text in enumerate(texts):
        prefix, body = _tokens(tokenizer, text, number)
        room = max(length - len(prefix), 1)
        slots.append([[*prefix, *body[i * room : (i + 1) * room]] for i in range(len(body) // room)])
        if not slots[-1]:
            raise ProfileError(
                f"text {number} has {len(body) + len(prefix):,} tokens, and the longest length is {length:,}: give "
                "longer texts or shorter lengths"
            )
    turns = [number for turn in range(pieces) for number, of_text in enumerate(slots) if turn < len(of_text)][:pieces]
    if len(turns) < pieces:
        raise ProfileError(
            f"the texts hold {len(turns)} pieces of {length:,} tokens, and {pieces} are asked for: give more text, "
            "shorter lengths or fewer pieces"
        )
    places = [np.linspace(0, len(of_text) - 1, turns.count(number)).round() for number, of_text in enumerate(slots)]
    return [of_text[int(place)] for of_text, chosen in zip(slots, places, strict=True) for place in chosen]


def _tokens(tokenizer: Any, text: Any, number: int) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before every text, and a text's own tokens."""
    if not isinstance(text, str):
        try:
            return [], [int(i) for i in text]
        except (TypeError, ValueError) as error:
            raise ProfileError(f"text {number} is neither a text nor token ids: {error}") from error
    if tokenizer is None or not text.strip():
        wrong = "is empty" if tokenizer is not None else "is a text, which needs a tokenizer; pass one, or token ids"
        raise ProfileError(f"text {number} {wrong}")
    own, probe = (list(tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"]) for t in (text, "a"))
    with_special = list(tokenizer("a", verbose=False)["input_ids"])
    starts = (i for i in range(len(with_special)) if with_special[i : i + len(probe)] == probe)
    return with_special[: next(starts, 0)], own


def _measured(model: Any, ids: list[list[int]], plan: Plan) -> list[Piece]:
    """The measured pieces in their order; each is measured by one process, and all of them get it."""
    shared = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
    numbers = range(rank, len(ids), world)
    steps = len(numbers) * 2 * model_shape(model)[0]
    own: Any = None
    error = None
    try:
        with tqdm(total=steps, desc="calibrating", unit="layer", disable=True if rank else None) as bar:
            own = {number: measure_piece(model, ids[number], plan, bar.update) for number in numbers}
    except Exception as caught:  # the other processes wait for this one, and must hear of it
        own, error = f"{type(caught).__name__}: {caught}", caught
    gathered = [own] * world
    if world > 1:
        dist.all_gather_object(gathered, own)
    if error is not None:
        raise error
    if failed := [f"process {number}: {part}" for number, part in enumerate(gathered) if isinstance(part, str)]:
        raise ProfileError(f"calibration ended, because another process failed: {'; '.join(failed)}")
    return [gathered[number % world][number] for number in range(len(ids))]


def _profile(found: list[Piece], plan: Plan, ids: list[list[int]], model: Any) -> Profile:
    """The profile that attends every key, of the measured pieces."""
    visible = np.stack([piece.visible for piece in found]).astype(float)  # [P, L, M, R]
    log_n = np.log(visible).mean((0, 3))
    kept, error, loss = (np.mean(parts, 0, dtype=float) for parts in list(zip(*found, strict=True))[2:])
    log_k = np.log(np.stack([piece.support for piece in found], 1).astype(float))  # [E, P, L, M, H, R]
    every_key = np.ones(kept.shape[1:3])
    return Profile(
        model=str(getattr(model.config, "_name_or_path", "")) or type(model).__name__,
        model_class=type(model).__name__,
        fingerprint=weights_fingerprint(model),
        texts=hashlib.sha256(np.array(ids, dtype=np.int64).tobytes()).hexdigest(),
        pieces=len(found),
        lengths=plan.lengths,
        visible=significant(np.exp(log_n)),
        windows=tuple(int(n) if n < plan.lengths[-1] else 0 for n in visible.max((0, 1, 3))),
        keys=plan.keys,
        kept=significant(np.clip(kept, 0.0, 1.0), 5),
        error=significant(error, 5),
        sensitivity=significant(_sensitivity(loss, error, visible.mean((0, 3)), np.array(plan.keys))),
        fits=tuple(fit_power_laws(log_n, *of_eps, plan.seed) for of_eps in zip(log_k, plan.eps, strict=True)),
        alpha=every_key,
        C=every_key,
        aim="dense",
        versions={
            "nc_patch": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    )


def _sensitivity(loss: np.ndarray, error: np.ndarray, visible: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Loss per unit of error of each head ``[M, H]``: the mean ratio over lengths and numbers of keys.

    It is taken where some keys are left out and the error is large enough to be measured.
    """
    error, visible = error[: len(loss)], visible[: len(loss), :, None, None]
    usable = (keys < visible) & (error > _MEASURABLE * error[..., :1]) & (error > 0)
    ratio = np.divide(loss, error, out=np.zeros_like(loss), where=usable)
    return np.asarray(ratio.sum((0, 3)) / np.maximum(usable.sum((0, 3)), 1))

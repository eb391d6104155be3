"""``sparse_attention``: the functional form, like ``scaled_dot_product_attention`` with a budget."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.nn.functional import pad

from nc_patch import library
from nc_patch.common import as_number, autocast_off, cast_for_autocast, check_bool, plain, say_once, shown
from nc_patch.config import NCConfig, as_selection, check_option_names
from nc_patch.ops.backends import choose_backend
from nc_patch.ops.derivatives import needs_gradient, refuse_transforms
from nc_patch.ops.means import PageMeans
from nc_patch.ops.problem import (
    MAX_DECODE_QUERIES,
    AttentionResult,
    Problem,
    causal_intervals,
    check_int32,
    check_intervals,
    check_tensors,
    describe,
)
from nc_patch.selections import Dense, Selection, selection_class, selection_names
from nc_patch.selections.index import LAYOUTS, KeyIndex


def sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, alpha: float | Sequence[float],
    C: float | Sequence[float] = 0.0, selection: str | Selection = "topk", scale: float | None = None,
    visible: torch.Tensor | None = None, origin: torch.Tensor | None = None, softcap: float | None = None,
    sinks: torch.Tensor | None = None, index: KeyIndex | None = None, means: KeyIndex | None = None,
    return_stats: bool = False, return_kept_mass: Literal["bounds"] | None = None, **options: Any,
) -> torch.Tensor | AttentionResult:  # fmt: skip
    """Causal attention of each query over ``k(n) = min(n, max(min_keys, ceil(alpha * n**C)))`` of its n visible keys.

    With ``alpha >= 1`` and ``C = 1``, or ``selection="dense"``, it equals ``scaled_dot_product_attention`` to rounding.
    Scores and softmax are float32. Gradients flow through the attended keys; the choice of keys is a constant. When a
    gradient is required the PyTorch backend runs.

    A NaN or infinite score that is attended makes its row NaN, as in dense attention; NaN counts as the highest score,
    so ``"topk"`` attends it. A NaN or infinite value does so too, and where kernels run, Triton's or those for CPUs, it
    may reach other rows of the same tile, up to 128. What no query sees is not read. Finite inputs never give NaN.

    Args:
        query: ``[B, Hq, Lq, D]``, bfloat16, float16 or float32.
        key, value: ``[B, Hkv, Lk, D]`` and ``[B, Hkv, Lk, Dv]``, Hkv a divisor of Hq (grouped queries).
        alpha, C: positive factor of the budget, and its exponent in [0, 1]; numbers, or one per query head.
        selection: ``"topk"`` (highest scores), ``"block"`` (key blocks shared by a block of queries), ``"window"``
            (sinks and most recent keys) or ``"dense"``; or an object of ``nc_patch.selections``, such as ``TopK()``.
        scale: factor of the scores, by default ``1 / sqrt(D)``.
        visible: int32 ``[B, Lq, 2]``, the half-open interval [start, end) of keys that each query may see; by default
            causal, the last query aligned with the last key, which needs Lq <= Lk.
        origin: int32 ``[B, Lq]``, the key position at which each query's sequence begins, by default its interval's
            start. ``"block"`` aligns its blocks to it, the tail of ``"topk"`` its pages.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: ``[Hq]``, learned logits that join the softmax's denominator.
        index: for decoding, at most 32 queries a sequence: the ``KeyIndex`` of ``key``, of kind ``"codes"`` for
            ``"topk"``, which changes no result, or ``"pages"`` for ``"block"``, by which every query chooses pages for
            itself. Given, it decides ``origin`` and ``block_size``. It has no gradient.
        means: the ``KeyIndex`` of kind ``"means"`` of ``key`` and ``value``, which spares ``tail="mean"`` the reading
            of all of them; at most 32 queries a sequence, of one origin. Its own is the default of ``origin``.
        return_stats: return an ``AttentionResult`` with lse, attended and kept_mass, which needs every key's score.
        return_kept_mass: ``"bounds"`` returns one with ``kept_mass_bounds``, which a codes index gives almost for free.
        options: options of the selection by name, such as ``sink_keys`` or ``block_size``, and ``min_keys``,
            ``backend`` and ``dense_below``, here 0 by default, of ``NCConfig``.

    Returns:
        ``[B, Hq, Lq, Dv]`` in query's dtype, zero for queries that see no key; or an ``AttentionResult``.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit; the message names them.
        TypeError: an option has an unknown name or a wrong type.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    config = _config(plain(alpha), plain(C), selection, **options)
    chosen = config.prefill
    query, key, value = cast_for_autocast(query, key, value)
    B, Hq, Lq, Lk = check_tensors(query, key, value, sinks)
    refuse_transforms(query, key, value)
    config.check_model(1, Hq)
    for given, kind in ((index, chosen.index_kind), (means, "means" if chosen.uses_means else None)):
        if given is not None:
            check_index(given, key, kind, repr(chosen), Lq)
    if origin is not None:
        check_int32("origin", origin, (B, Lq), query.device)
    elif means is not None:  # whose pages are counted from there
        origin = means.origin[:, None].expand(B, Lq)
    if visible is not None:
        check_int32("visible", visible, (B, Lq, 2), query.device)
        check_intervals(visible, Lk)
        visible = visible.view_as(visible)  # what is worked out once for a call is not left on the caller's tensor
        if chosen.uses_means:
            check_sequences(visible, visible[..., 0] if origin is None else origin)
    elif Lq <= Lk:
        visible = causal_intervals(B, Lq, Lk, query.device)
    else:
        raise ValueError(
            f"causal attention needs at least as many keys as queries, got Lq={Lq} and Lk={Lk}; pass visible"
        )
    origin = visible[..., 0] if origin is None else origin
    check_bool("return_stats", return_stats)
    wants_bounds = return_kept_mass is not None
    if return_kept_mass not in (None, "bounds"):
        raise ValueError(f'return_kept_mass must be "bounds" or None, got {return_kept_mass!r}')
    if wants_bounds and (index is None or not chosen.bounds_kept_mass):
        raise ValueError('bounds of the kept mass come from codes: pass index=KeyIndex.build(key, "codes")')
    if return_stats and index is not None and chosen.bounds_kept_mass:
        raise ValueError(
            "return_stats needs the score of every key, which an index is there to avoid: leave out index, or ask for "
            'return_kept_mass="bounds"'
        )
    if config.is_dense(0) and not wants_bounds:
        chosen = Dense()
    problem = Problem(
        *(query, key, value, visible.contiguous(), origin.contiguous(), config.row_budgets(visible, Lk, 0)),
        scale=check_scale(scale, softcap, query.shape[-1]),
        softcap=0.0 if softcap is None else float(softcap),
        sinks=sinks,
        means=None if means is None else PageMeans(*means.tensors()),
        stats=bool(return_stats),
        bounds=wants_bounds,
    )
    if index is not None and not isinstance(chosen, Dense):
        problem = by_index(problem, index, config.largest_budget(Lk, 0))
    with autocast_off(query):
        result = attend(problem, chosen, config.backend)
    return result if return_stats or wants_bounds else result.output


# What acts in patched models alone.
_ELSEWHERE = ("prefill", "decode", "track", "on_drop", "max_dropped_mass", "dense_layers", "key_index")


def _config(alpha: Any, C: Any, selection: Any, **options: Any) -> NCConfig:
    """The settings of one call; refuses what acts in patched models alone."""
    given = [name for name in options if name in _ELSEWHERE]
    if given:
        raise TypeError(
            f"{', '.join(given)} acts in patched models; leave it out. To measure and act on the kept mass, ask "
            "sparse_attention for return_stats or return_kept_mass"
        )
    check_option_names(options, but=_ELSEWHERE)
    # By both names: Dynamo of PyTorch 2.11 gives a frozen dataclass the defaults of what is left out.
    phases = dict.fromkeys(("prefill", "decode"), as_selection("selection", selection))
    per_head = lambda v: [list(v)] if isinstance(v, Sequence) and not isinstance(v, (str, bytes)) else v  # noqa: E731
    return NCConfig(per_head(alpha), per_head(C), **phases, **{"dense_below": 0, **options})


def by_index(problem: Problem, index: KeyIndex, most: int) -> Problem:
    """The problem, to be decoded by an index; no budget is larger than ``most``."""
    origin = problem.origin
    if LAYOUTS[index.kind].paged:
        origin = index.origin[:, None].expand(problem.visible.shape[:2]).contiguous()
    return problem._replace(origin=origin, key_index=index.tensors(), page_size=index.block_size, most=most)


def attend(problem: Problem, selection: Selection, backend: str) -> AttentionResult:
    """The output of a selection on a problem, with what that asks for, and ``attended`` where only the selection knows
    it; ``backend`` as in ``NCConfig``.
    """
    chosen, reason = backend_of(problem, selection, backend)
    if reason is not None:
        what = f"decoding by {selection.index_kind}" if problem.phase == "decode" else f"{selection.name} attention"
        say_once(f"{what} runs on the PyTorch backend: {reason}.")
    result = library.attend(selection, problem, chosen)
    if not problem.stats and not problem.bounds:
        return result if result.lse is None else result._replace(lse=None)
    if result.attended is None:
        budget = (problem.over_all_keys() if isinstance(selection, Dense) else problem).budget
        result = result._replace(attended=budget.expand(problem.query.shape[:3]).contiguous())
    return result


def backend_of(problem: Problem, selection: Selection, backend: str) -> tuple[str, str | None]:
    """Which backend runs a selection on a problem, and why no faster one; ``backend`` as in ``NCConfig``."""
    phase = problem.phase
    needs_grad = phase == "prefill" and needs_gradient(*problem[:3], problem.sinks)
    options = {"head_dims": problem.head_dims, "needs_grad": needs_grad, "implemented": selection.backends(phase)}
    return choose_backend(backend, problem.query.device, **options)  # type: ignore[arg-type]


def check_index(index: KeyIndex, key: torch.Tensor, kind: str | None, used_by: str, query_length: int) -> None:
    """Raises ValueError unless an index is of the kind that goes with ``used_by``, and of keys of this shape."""
    if not isinstance(index, KeyIndex):
        raise TypeError(f"index and means must be made by KeyIndex.build(key, ...), got {type(index).__name__}")
    if kind != index.kind:
        kinds = {name: selection_class(name).index_kind for name in selection_names()}
        wanted = ", ".join(f'"{kind}" for selection "{name}"' for name, kind in kinds.items() if kind)
        raise ValueError(
            f'an index must be of kind {wanted}, and means "means" for one with tail="mean"; '
            f'got "{index.kind}" for {used_by}'
        )
    if not index.fits(key) or index.capacity < key.shape[2]:
        raise ValueError(
            f"the index is of other keys than {describe(key)} (it has room for {index.capacity}, of {index.dtype}); "
            "build it from these keys, or extend it"
        )
    if query_length > MAX_DECODE_QUERIES:
        raise ValueError(f"an index serves at most {MAX_DECODE_QUERIES} queries at a time, got {query_length}")


def check_sequences(visible: torch.Tensor, origin: torch.Tensor) -> None:
    """Raises ValueError unless every interval lies within its own sequence, which reaches from its origin to the next
    one in the same row of the batch; reads the tensors.
    """
    far = torch.iinfo(torch.int32).max
    is_token, origin = visible[..., 1] > visible[..., 0], origin.contiguous()
    begins = pad(origin.masked_fill(~is_token, far).sort(-1).values, (0, 1), value=far)
    after = begins.gather(-1, torch.searchsorted(begins, origin, right=True).clamp(max=origin.shape[1]))
    wrong = (is_token & ((visible[..., 0] < origin) | (visible[..., 1] > after))).nonzero()
    if len(wrong):
        b, row = wrong[0].tolist()
        interval, reach = visible[b, row].tolist(), [int(origin[b, row]), int(after[b, row])]
        raise ValueError(
            f"visible has the interval {interval} in sequence {b} of the batch, which reaches from {reach[0]} to "
            f"{reach[1]}, and page means cut sequences into pages. Pass origin, int32 [B, Lq], where each query's "
            'sequence begins, or tail="drop"'
        )


_LARGEST = torch.finfo(torch.float32).max


def check_scale(scale: float | None, softcap: float | None, head_dim: int) -> float:
    """The scale, by default ``1 / sqrt(D)``; raises ValueError unless scale and softcap are positive and finite."""
    if type(scale) is float and softcap is None and 0 < scale <= _LARGEST:
        return scale
    given = (("scale", scale, "a positive number"), ("softcap", softcap, "a positive number or None"))
    for name, value, allowed in given:
        found = as_number(value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value)
        if value is not None and (found is None or not 0 < found <= _LARGEST):
            raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    return head_dim**-0.5 if scale is None else float(scale)

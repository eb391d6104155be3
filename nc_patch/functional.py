"""``sparse_attention``: the functional form, like ``scaled_dot_product_attention`` with a budget."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from torch.autograd import forward_ad

from nc_patch.common import as_bool, as_number, autocast_off, lowered, plain, say_once
from nc_patch.config import SELECTIONS, NCConfig, Selection, shown
from nc_patch.ops import custom_ops, decode_ops
from nc_patch.ops.backends import choose_backend
from nc_patch.ops.derivatives import call, in_transform, refuse_forward_mode, refuse_mapped
from nc_patch.ops.limits import DTYPES, MAX_DECODE_QUERIES
from nc_patch.ops.reference import AttentionResult, causal_intervals
from nc_patch.selections.block.torch_decode import torch_block_decode
from nc_patch.selections.index import KIND_OF, IndexKind, KeyIndex


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    alpha: float | Sequence[float],
    C: float | Sequence[float] = 0.0,
    selection: Selection = "topk",
    scale: float | None = None,
    visible: torch.Tensor | None = None,
    origin: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    index: KeyIndex | None = None,
    means: KeyIndex | None = None,
    return_stats: bool = False,
    return_kept_mass: Literal["bounds"] | None = None,
    **options: Any,
) -> torch.Tensor | AttentionResult:
    """Causal attention of each query over ``k(n) = min(n, max(min_keys, ceil(alpha * n**C)))`` of its n visible keys.

    With ``alpha >= 1`` and ``C = 1``, or ``selection="dense"``, it equals ``scaled_dot_product_attention`` to rounding.
    Scores and softmax are float32. Gradients flow through the attended keys; the choice of keys is a constant. When a
    gradient is required the PyTorch backend runs.

    A NaN or infinite score that is attended makes its row NaN, as in dense attention; NaN counts as the highest score,
    so ``"topk"`` attends it. Other rows are not touched.

    Args:
        query: ``[B, Hq, Lq, D]``, bfloat16, float16 or float32.
        key: ``[B, Hkv, Lk, D]``, Hkv a divisor of Hq (grouped queries).
        value: ``[B, Hkv, Lk, Dv]``.
        alpha: factor of the budget, positive; a number, or one per query head.
        C: exponent of the budget in [0, 1]; a number, or one per query head.
        selection: ``"topk"`` (highest scores), ``"block"`` (key blocks shared by a block of queries), ``"window"``
            (sinks and most recent keys) or ``"dense"``.
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
            of all of them; at most 32 queries a sequence, of one origin.
        return_stats: return an ``AttentionResult`` (output, lse, kept_mass, attended) instead of the output alone. The
            kept mass needs the score of every key.
        return_kept_mass: ``"bounds"`` returns an ``AttentionResult`` with ``kept_mass_bounds``, which a codes index
            gives almost for free.
        options: ``sink_keys``, ``recent_keys``, ``min_keys``, ``block_size``, ``query_block_size``, ``sample_stride``,
            ``estimator``, ``min_mass``, ``max_factor``, ``refine``, ``tail``, ``law`` and ``backend`` of
            ``NCConfig``.

    Returns:
        ``[B, Hq, Lq, Dv]`` in query's dtype, zero for queries that see no key; or an ``AttentionResult``.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit; the message names them.
        TypeError: an option has an unknown name or a wrong type.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    refuse_mapped(alpha=alpha, C=C, visible=visible, origin=origin, scale=scale, softcap=softcap)
    alpha, C = plain(alpha), plain(C)
    per_head = lambda v: [list(v)] if isinstance(v, Sequence) and not isinstance(v, (str, bytes)) else v  # noqa: E731
    if selection is None:
        raise ValueError(f"selection must be one of {', '.join(map(repr, SELECTIONS))}, got None")
    _check_options(options)
    config = NCConfig.create(per_head(alpha), per_head(C), selection=selection, **options)
    query, key, value = lowered(query, key, value)
    B, Hq, Lq, Lk = check_tensors(query, key, value, sinks)
    if len(config.laws(0)) not in (1, Hq):
        raise ValueError(f"alpha and C are given for {len(config.laws(0))} heads, query has {Hq}")
    visible_given = visible is not None
    if visible is None:
        if Lq > Lk:
            raise ValueError(
                f"causal attention needs at least as many keys as queries, got Lq={Lq} and Lk={Lk}; pass visible"
            )
        visible = causal_intervals(B, Lq, Lk, query.device)
    else:
        check_intervals(visible, B, Lq, Lk, query.device)
    if origin is None:
        origin = visible[..., 0]
    elif (
        not isinstance(origin, torch.Tensor)
        or origin.shape != (B, Lq)
        or origin.dtype != torch.int32
        or origin.device != query.device
    ):
        raise ValueError(f"origin must be int32 [{B}, {Lq}] on {query.device}, got {_describe(origin)}")
    if visible_given and config.tail == "mean" and selection == "topk":
        check_sequences(visible, origin)
    if as_bool(return_stats) is None:
        raise TypeError(f"return_stats must be True or False, got {shown(return_stats)}")
    if return_kept_mass not in (None, "bounds"):
        raise ValueError(f'return_kept_mass must be "bounds" or None, got {return_kept_mass!r}')
    if index is not None:
        check_index(index, key, KIND_OF.get(selection), f'selection "{selection}"', Lq)
    if means is not None:
        check_index(means, key, "means" if config.tail == "mean" else None, f'tail="{config.tail}"', Lq)
    wants_bounds = return_kept_mass is not None
    if wants_bounds and (index is None or index.kind != "codes"):
        raise ValueError('bounds of the kept mass come from codes: pass index=KeyIndex.build(key, "codes")')
    if return_stats and index is not None and index.kind == "codes":
        raise ValueError(
            "return_stats needs the score of every key, which an index is there to avoid: leave out index, or ask for "
            'return_kept_mass="bounds"'
        )
    if not config.refine and index is None:
        raise ValueError('refine=False scores keys by their codes: pass index=KeyIndex.build(key, "codes")')
    scale = check_scale(scale, softcap, query.shape[-1])
    with autocast_off(query):
        result = attend(
            query,
            key,
            value,
            visible=visible,
            origin=origin,
            budget=budgets_of(config, 0, visible, Lk),
            selection="dense" if config.is_dense(0) and not wants_bounds else selection,
            config=config,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            index=index,
            means=means,
            max_budget=0 if index is None else config.largest_budget(Lk, 0),
            want_stats=return_stats,
            want_bounds=wants_bounds,
        )
    return result if return_stats or wants_bounds else result.output


# Fields of NCConfig that one call of attention has a use for, beside alpha, C and the selection.
_OPTIONS = (
    *("sink_keys", "recent_keys", "min_keys", "block_size", "query_block_size", "sample_stride", "estimator"),
    *("min_mass", "max_factor", "refine", "tail", "law", "backend"),
)
_ELSEWHERE = {field.name for field in fields(NCConfig)} - {*_OPTIONS, "alpha", "C"}


def _check_options(options: dict[str, Any]) -> None:
    """Refuses what acts in patched models alone; what NCConfig does not know it refuses itself."""
    given = [name for name in options if name in _ELSEWHERE]
    if given:
        raise TypeError(
            f"{', '.join(given)} acts in patched models; sparse_attention takes {', '.join(_OPTIONS)}. To measure and "
            "act on the kept mass, ask for return_stats or return_kept_mass"
        )


def budgets_of(config: NCConfig, layer: int, visible: torch.Tensor, key_length: int) -> torch.Tensor:
    """Budgets int32 ``[B, 1 or Hq, Lq]`` of a layer's queries with intervals ``visible`` int32 ``[B, Lq, 2]``."""
    alphas, exponents = zip(*config.laws(layer), strict=True)
    return custom_ops.row_budgets(visible, key_length, list(alphas), list(exponents), config.min_keys, config.law)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    visible: torch.Tensor,
    origin: torch.Tensor,
    budget: torch.Tensor,
    selection: str,
    config: NCConfig,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    index: KeyIndex | None = None,
    means: KeyIndex | None = None,
    max_budget: int = 0,
    want_stats: bool = False,
    want_bounds: bool = False,
    audit_seed: int = -1,
) -> AttentionResult:
    """Runs one selection on checked tensors; ``sparse_attention`` has the meaning of each argument.

    ``budget`` is int32 ``[B, 1 or Hq, Lq]``; ``"dense"`` does not look at it. With an index, ``max_budget`` is the
    largest that any of them may be.

    Returns:
        The output; ``attended`` for ``"block"`` always; all four fields with ``want_stats``; ``audit`` for
        ``"block"`` in prefill where ``audit_seed``, of the rows that are drawn, is not negative.
    """
    head_dims, needs_grad = (query.shape[-1], value.shape[-1]), needs_gradient(query, key, value, sinks)
    tail: tuple[torch.Tensor, ...] = ()
    if config.tail == "mean" and selection == "topk":
        if means is None:
            upkeep, _ = choose_backend(
                config.backend, "means", query.device, needs_grad=needs_grad, head_dims=head_dims
            )
            pair = call(decode_ops.page_means, key, value, visible, origin, upkeep)
        else:
            pair = means.means()
        tail = (*pair, origin)
    if index is not None and selection != "dense":
        return _attend_by_index(
            *(query, key, value, visible, budget, sinks, index, tail, config, scale, softcap, max_budget),
            want_stats=want_stats,
            want_bounds=want_bounds,
        )
    kind = "means" if tail else selection
    backend, reason = choose_backend(
        config.backend, kind, query.device, needs_grad=needs_grad, head_dims=head_dims, estimator=config.estimator
    )
    if reason is not None:
        say_once(f"{selection} attention runs on the PyTorch backend: {reason}.")
    cap = 0.0 if softcap is None else float(softcap)
    if selection == "block":
        output, lse, kept_mass, attended, estimate, audit = call(
            custom_ops.block_attention,
            *(query, key, value, visible, origin, budget, sinks, scale, cap, config.block_size),
            *(config.query_block_size, config.sample_stride, config.min_mass or 0.0, config.max_factor),
            *(config.estimator, want_stats, backend, audit_seed),
        )
        audited = audit if audit_seed >= 0 else None
        if not want_stats:
            return AttentionResult(output, attended=attended, block_estimate=estimate, block_audit=audited)
        return AttentionResult(output, lse, kept_mass, attended, block_estimate=estimate, block_audit=audited)
    run = custom_ops.window_attention if selection == "window" else custom_ops.topk_attention
    if selection == "dense":
        budget = (visible[..., 1] - visible[..., 0]).clamp(min=0)[:, None]
        # With all keys attended the kinds are the same; each backend has one that does the least for it.
        run = custom_ops.window_attention if backend == "triton" else custom_ops.topk_attention
    output, lse, kept_mass = call(
        run,
        query,
        key,
        value,
        visible,
        budget,
        sinks,
        scale,
        cap,
        config.sink_keys,
        config.recent_keys,
        want_stats,
        backend,
        *tail,
    )
    if not want_stats:
        return AttentionResult(output)
    return AttentionResult(output, lse, kept_mass, budget.expand(query.shape[:3]).contiguous())


def _attend_by_index(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    budget: torch.Tensor,
    sinks: torch.Tensor | None,
    index: KeyIndex,
    tail: tuple[torch.Tensor, ...],
    config: NCConfig,
    scale: float,
    softcap: float | None,
    max_budget: int,
    *,
    want_stats: bool,
    want_bounds: bool,
) -> AttentionResult:
    head_dims = (query.shape[-1], value.shape[-1])
    backend, reason = choose_backend(config.backend, "means" if tail else index.kind, query.device, head_dims=head_dims)
    if reason is not None:
        say_once(f"decoding by {index.kind} runs on the PyTorch backend: {reason}.")
    cap = 0.0 if softcap is None else float(softcap)
    if index.kind == "pages":
        origin = index.origin[:, None].expand(visible.shape[:2])
        tensors = (query, key, value, visible, origin, budget, sinks, *index.pages())
        if backend == "torch" and decode_ops.runs_directly(*tensors):
            output, lse, kept_mass, attended = torch_block_decode(
                *tensors, scale=scale, softcap=cap, block_size=index.block_size, want_stats=want_stats
            )
        else:
            output, lse, kept_mass, attended = call(
                decode_ops.block_decode, *tensors, scale, cap, index.block_size, max_budget, want_stats, backend
            )
        if not want_stats:
            return AttentionResult(output, attended=attended)
        return AttentionResult(output, lse, kept_mass, attended)
    output, lse, bounds = call(
        decode_ops.topk_decode,
        *(query, key, value, visible, budget, sinks, *index.codes(), scale, cap),
        *(config.sink_keys, config.recent_keys, config.refine, max_budget, want_bounds, backend, *tail),
    )
    if not want_bounds:
        return AttentionResult(output)
    attended = budget.expand(query.shape[:3]).contiguous()
    return AttentionResult(output, lse, attended=attended, kept_mass_bounds=bounds)


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will want the gradient of any of the tensors."""
    wanted = in_transform() or any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return torch.is_grad_enabled() and wanted


def check_index(index: KeyIndex, key: torch.Tensor, kind: IndexKind | None, used_by: str, query_length: int) -> None:
    """Raises ValueError unless an index is of the kind that goes with ``used_by``, and of keys of this shape."""
    if not isinstance(index, KeyIndex):
        raise TypeError(f"index and means must be made by KeyIndex.build(key, ...), got {type(index).__name__}")
    if kind != index.kind:
        wanted = ", ".join(f'"{kind}" for selection "{name}"' for name, kind in KIND_OF.items())
        raise ValueError(
            f'an index must be of kind {wanted}, and means "means" for tail="mean"; got "{index.kind}" for {used_by}'
        )
    if not index.fits(key) or index.capacity < key.shape[2]:
        raise ValueError(
            f"the index is of other keys than {_describe(key)} (it has room for {index.capacity}, of {index.dtype}); "
            "build it from these keys, or extend it"
        )
    if query_length > MAX_DECODE_QUERIES:
        raise ValueError(f"an index serves at most {MAX_DECODE_QUERIES} queries at a time, got {query_length}")


def check_tensors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[int, int, int, int]:
    """Raises ValueError unless the tensors fit together; returns B, Hq, Lq and Lk."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor [batch, heads, length, head_dim], got {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, heads, length, head_dim], got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"{name} must be one of {allowed}, got {tensor.dtype}; convert it, or the model, by .to()")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}: move them to one device")
    _refuse_tangents(query, key, value)
    B, Hq, Lq, D = query.shape
    Hkv, Lk = key.shape[1], key.shape[2]
    if key.shape != (B, Hkv, Lk, D) or value.shape[:3] != (B, Hkv, Lk):
        raise ValueError(
            "key must be [B, Hkv, Lk, D] and value [B, Hkv, Lk, Dv] with query's B and D, got "
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if D == 0 or value.shape[3] == 0:
        raise ValueError(f"head_dim must be at least 1, got query {tuple(query.shape)}, value {tuple(value.shape)}")
    if Hkv == 0 or Hq == 0 or Hq % Hkv:
        raise ValueError(f"the number of query heads must be a multiple of the key/value heads, got {Hq} and {Hkv}")
    if sinks is not None and (
        not isinstance(sinks, torch.Tensor) or sinks.shape != (Hq,) or sinks.device != query.device
    ):
        raise ValueError(f"sinks must be [{Hq}] on {query.device}, got {_describe(sinks)}")
    return B, Hq, Lq, Lk


def _refuse_tangents(*tensors: torch.Tensor) -> None:
    """Refuses derivatives in forward mode, which PyTorch takes for zero where an operation has none."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        refuse_forward_mode()


def check_intervals(visible: torch.Tensor, B: int, Lq: int, Lk: int, device: torch.device) -> None:
    """Raises ValueError unless ``visible`` holds intervals within the keys; reads the tensor."""
    if (
        not isinstance(visible, torch.Tensor)
        or visible.shape != (B, Lq, 2)
        or visible.dtype != torch.int32
        or visible.device != device
    ):
        raise ValueError(f"visible must be int32 [{B}, {Lq}, 2] on {device}, got {_describe(visible)}")
    if visible.numel():
        low, high = int(visible.min()), int(visible.max())
        if low < 0 or high > Lk:
            raise ValueError(f"visible must lie within the keys, 0 to {Lk}, got {low} to {high}")
        if bool((visible[..., 1] < visible[..., 0]).any()):
            raise ValueError(
                "visible has an interval that ends before it starts; make start and end equal where it is empty"
            )


def check_sequences(visible: torch.Tensor, origin: torch.Tensor) -> None:
    """Raises ValueError unless every interval lies within its own sequence; reads the tensors.

    A sequence reaches from its origin to the next one in the same row of the batch.
    """
    for b, (seen, begin) in enumerate(zip(visible, origin, strict=True)):
        rows = seen[:, 1] > seen[:, 0]
        begin, seen = begin[rows], seen[rows]
        origins = begin.unique()
        following = torch.cat((origins, origins.new_tensor([torch.iinfo(torch.int32).max])))
        after = following[torch.searchsorted(origins, begin, right=True)]
        wrong = ((seen[:, 0] < begin) | (seen[:, 1] > after)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            interval, reach = seen[row].tolist(), [int(begin[row]), int(after[row])]
            raise ValueError(
                f"visible has the interval {interval} in sequence {b} of the batch, which reaches from {reach[0]} to "
                f"{reach[1]}, and the tail cuts sequences into pages. Pass origin, int32 [B, Lq], where each query's "
                'sequence begins, or tail="drop"'
            )


def check_scale(scale: float | None, softcap: float | None, head_dim: int) -> float:
    """The scale, by default ``1 / sqrt(D)``; raises ValueError unless scale and softcap are positive and finite."""
    for name, value, allowed in (
        ("scale", scale, "a positive number"),
        ("softcap", softcap, "a positive number or None"),
    ):
        if value is None:
            continue
        found = as_number(value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value)
        if found is None or not 0 < found <= torch.finfo(torch.float32).max:
            raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    return head_dim**-0.5 if scale is None else float(scale)


def _describe(tensor: Any) -> str:
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"

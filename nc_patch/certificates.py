"""What a call of attention is certain to keep of the dense softmax mass, and what happens where that is too little.

The kept mass of a row, a query and a head, is the sum of the dense softmax weights of the keys that it attends, over
the keys alone: neither a learned sink nor the means of ``tail="mean"`` count. A certificate is an interval that holds
it whatever the rounding: from codes, or from every score.
"""

import logging
import math
from typing import NamedTuple

import torch

from nc_patch.common import DroppedMassError
from nc_patch.config import NCConfig
from nc_patch.ops.reference import AttentionResult
from nc_patch.selections.topk.codes import product_slack
from nc_patch.stats import LayerCounters
from nc_patch.visibility import own_keys

logger = logging.getLogger("nc_patch")

# Relative width for the rounding of sums of exponentials in float32, and absolute for what underflows.
_SUM_SLACK = 1e-4
_SMALLEST_MASS = 1e-30
# By how much an estimate may fall short without being said to, for its own rounding.
_ESTIMATE_ROUNDING = 1e-5
_FLOAT32_ROUNDING = 2.0**-24


class Call(NamedTuple):
    """What a layer was called with.

    Attributes:
        phase: ``"prefill"`` or ``"decode"``.
        query: ``[B, Hq, Lq, D]``. key: ``[B, Hkv, Lk, D]``. visible: int32 ``[B, Lq, 2]``. origin: int32 ``[B, Lq]``.
        scale, softcap: of the scores.
    """

    layer: int
    phase: str
    query: torch.Tensor
    key: torch.Tensor
    visible: torch.Tensor
    origin: torch.Tensor
    scale: float
    softcap: float | None


class Excess(NamedTuple):
    """A row that drops more than is allowed, or, without a position, a head that is estimated to.

    Attributes:
        sequence, position: of the batch, and of the query in its sequence.
        kept_mass: the least that it keeps, or the estimate.
    """

    head: int
    sequence: int | None
    position: int | None
    kept_mass: float


@torch.compiler.disable
@torch.no_grad()
def record(counters: LayerCounters, config: NCConfig, call: Call, selection: str, result: AttentionResult) -> bool:
    """Counts the kept mass of a call, and does what ``on_drop`` asks where it is too little.

    Args:
        result: of ``selection``, with what ``certified_bounds`` or ``find_estimated_excess`` need; of ``"dense"``
            nothing is looked at.

    Returns:
        Whether the call is to be done again, dense; it is then not counted.

    Raises:
        DroppedMassError: ``on_drop`` is ``"raise"``.
    """
    mass, limit, acts = counters.mass[call.phase], 1 - config.max_dropped_mass, config.on_drop != "ignore"
    if selection == "dense":
        mass.add_dense(call.visible, call.query.shape[1])
        return False
    audit = result.block_audit
    if audit is not None:
        excess = find_estimated_excess(audit, limit) if acts else None
    else:
        bounds = certified_bounds(result, call)
        excess = find_excess(bounds, call.visible, call.origin, limit) if acts else None
    if excess is not None:
        counters.add_exceeded()
    if excess is not None and config.on_drop == "dense":
        return True
    if audit is None:
        mass.add_bounds(bounds, call.visible, "exact" if result.kept_mass_bounds is None else "bounds", limit)
    else:
        assert result.block_estimate is not None
        mass.add_audit(audit, result.block_estimate[:, 3:].sum(0) if config.min_mass is not None else None)
    if excess is not None:
        _act_on(excess, config, counters, call)
    return False


def refuse_graphs(on_drop: str, layer: int) -> None:
    """Raises RuntimeError: a compiled or captured graph, or a transform, cannot look at what it has dropped."""
    raise RuntimeError(
        f'on_drop="{on_drop}" reads in layer {layer} how much was dropped, which neither torch.compile(fullgraph=True) '
        'nor a CUDA graph can, nor a transform of torch.func: set on_drop="ignore" (track=True has no effect there), '
        "or run without them"
    )


def certified_bounds(result: AttentionResult, call: Call) -> torch.Tensor:
    """Limits between which the kept mass of every row lies, float32 ``[B, Hq, Lq, 2]``; does not read the device.

    ``result`` has ``attended``, and ``kept_mass_bounds`` or ``kept_mass`` as computed in float32.
    """
    bounds = result.kept_mass_bounds
    if bounds is None:
        assert result.kept_mass is not None
        bounds = _rounding_bounds(result.kept_mass, call)
    assert result.attended is not None
    all_kept = result.attended >= (call.visible[..., 1] - call.visible[..., 0]).clamp(min=0)[:, None]
    return bounds.masked_fill(all_kept[..., None], 1.0)


def find_excess(bounds: torch.Tensor, visible: torch.Tensor, origin: torch.Tensor, limit: float) -> Excess | None:
    """The row with the least certified kept mass, where that is below ``limit``; reads the device.

    Args:
        bounds: ``[B, Hq, Lq, 2]``. visible: int32 ``[B, Lq, 2]``. origin: int32 ``[B, Lq]``.
    """
    lower = bounds[..., 0].masked_fill((visible[..., 1] <= visible[..., 0])[:, None], 1.0)
    if lower.numel() == 0:
        return None
    least, at = lower.flatten().min(0)
    if float(least) >= limit:
        return None
    b, head, row = (int(i) for i in torch.unravel_index(at, lower.shape))
    return Excess(head, b, int(own_keys(visible)[b, row] - origin[b, row]), float(least))


def find_estimated_excess(audit: torch.Tensor, limit: float) -> Excess | None:
    """The head that is estimated to keep least of its rows' mass, where that is below ``limit``; reads the device.

    ``audit`` is float32 ``[Hq + 1, 5]``, columns ``audit.AUDIT_COLUMNS``.
    """
    rows, kept = audit[:-1, :2].double().cpu().unbind(-1)
    if not len(rows) or not bool(rows[0] > 0):
        return None
    share, head = (kept / rows).clamp(0, 1).min(0)
    return Excess(int(head), None, None, float(share)) if float(share) < limit - _ESTIMATE_ROUNDING else None


def _describe(excess: Excess, config: NCConfig, call: Call) -> str:
    """What was dropped where, and what to do about it."""
    allowed = f"1 - max_dropped_mass = {1 - config.max_dropped_mass:g}"
    where = f"layer {call.layer}, head {excess.head}"
    if excess.position is None:
        what = (
            f"{where}: in a call of {call.phase} its rows keep by estimate {excess.kept_mass:.4f} of the dense softmax"
        )
        what += f" mass on average, less than {allowed}"
    else:
        where += f", position {excess.position} of sequence {excess.sequence}"
        what = f"{where}: in {call.phase} only {excess.kept_mass:.4f} of the dense softmax mass is certain to be kept"
        what += f", less than {allowed}"
    return (
        f'{what}. Raise alpha, C or max_dropped_mass, leave the layer dense with dense_layers, or set on_drop="dense"'
    )


def _act_on(excess: Excess, config: NCConfig, counters: LayerCounters, call: Call) -> None:
    if config.on_drop == "raise":
        raise DroppedMassError(
            _describe(excess, config, call) + ".",
            layer=call.layer,
            head=excess.head,
            position=excess.position,
            kept_mass=excess.kept_mass,
            certified=excess.position is not None,
        )
    if counters.warn_once():
        said = _describe(excess, config, call)
        logger.warning("%s. Said once for each layer; nc_stats counts such calls.", said)


# What a factor of a float32 matrix product is rounded by, where PyTorch is allowed to be faster than exact.
_FACTOR_ROUNDING = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}


def _matrix_slack(size: torch.Tensor, head_dim: int) -> torch.Tensor:
    """What a score from a matrix product may be off by; ``size`` is the product of the norms.

    Matrix units may cut where others round. ``torch.set_float32_matmul_precision`` allows factors of fewer digits.
    """
    factors = _FACTOR_ROUNDING[torch.get_float32_matmul_precision()]
    return 2 * product_slack(size, head_dim) + size * (2 * factors + factors**2)


def _rounding_bounds(kept_mass: torch.Tensor, call: Call) -> torch.Tensor:
    """What the kept mass can be where it was computed as ``kept_mass`` in float32."""
    query, key, visible, scale = call.query, call.key, call.visible, call.scale
    Hq, (Hkv, Lk, D) = query.shape[1], key.shape[1:]
    norm = torch.linalg.vector_norm
    # A buffer may hold anything beyond the keys that are seen.
    position = torch.arange(Lk, device=key.device)
    start = torch.where(visible[..., 1] > visible[..., 0], visible[..., 0], Lk).amin(-1)[:, None, None]
    end = visible[..., 1].amax(-1)[:, None, None]
    key_norm = norm(key, dim=-1, dtype=torch.float32).masked_fill((position < start) | (position >= end), 0.0)
    largest = key_norm.amax(-1).repeat_interleave(Hq // Hkv, 1)[..., None]
    size = (norm(query, dim=-1, dtype=torch.float32) * largest).double()
    cap = math.inf if call.softcap is None else call.softcap
    magnitude = (scale * size).clamp(max=cap)
    off = scale * _matrix_slack(size, D) + 16 * _FLOAT32_ROUNDING * magnitude
    # Twice: what is attended may be lower and the rest higher than computed.
    shift = torch.exp(2 * off)
    slack = _SUM_SLACK + 8 * _FLOAT32_ROUNDING * (magnitude + math.log(max(Lk, 2)))
    kept = kept_mass.double().clamp(0, 1)
    lower = kept / (kept + (1 - kept) * shift) * (1 - slack * shift) - _SMALLEST_MASS
    upper = kept * shift / (kept * shift + 1 - kept) * (1 + slack) + _SMALLEST_MASS
    # The float64 limits are rounded away from each other.
    lower, upper = lower.nan_to_num(nan=0.0) * (1 - 2 * _FLOAT32_ROUNDING), upper.nan_to_num(nan=1.0)
    upper = upper * (1 + 2 * _FLOAT32_ROUNDING)
    return torch.stack((lower.clamp(0, 1), upper.clamp(0, 1)), -1).float()

"""What a call of attention is certain to keep of the dense softmax mass, and what happens where that is too little.

The kept mass of a row, a query and a head, is the sum of the dense softmax weights of the keys that it attends, without
a learned sink and the means of ``tail="mean"``. A certificate is an interval that holds it whatever the rounding.
"""

import torch

from nc_patch.common import DroppedMassError, logger
from nc_patch.layers import LayerPatch
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.ops.rounding import rounding_bounds
from nc_patch.visibility import own_keys

# By how much an estimate may fall short without being said to, for its own rounding.
_ESTIMATE_ROUNDING = 1e-5


@torch.compiler.disable
@torch.no_grad()
def record(patch: LayerPatch, problem: Problem, result: AttentionResult, phase: str) -> bool:
    """Counts the kept mass of a call, and does what ``on_drop`` asks where it is too little.

    ``result`` has an audit, or what ``certified_bounds`` needs. Returns whether the call is to be done again, dense; it
    is then not counted. Raises DroppedMassError where ``on_drop`` is ``"raise"``.
    """
    config, counters, audit = patch.config, patch.counters, result.audit
    limit, mass = 1 - config.max_dropped_mass, counters.mass[phase]
    if audit is None:
        bounds = certified_bounds(result, problem)
        kept = bounds[..., 0]
    else:
        kept = (audit[None, :-1, 1:2].double() / audit[None, :-1, :1]).nan_to_num(nan=1.0).clamp(0, 1)
    error = None
    if config.on_drop != "ignore":
        error = find_drop(kept, problem, limit, layer=patch.layer, phase=phase, certified=audit is None)
    first = error is not None and counters.add_exceeded()
    if error is not None and config.on_drop == "dense":
        return True
    if audit is None:
        mass.add_bounds("exact" if result.kept_mass_bounds is None else "bounds", bounds, problem.visible, limit)
    else:
        mass.add_audit(audit)
    if error is not None and config.on_drop == "raise":
        raise error
    if first:
        logger.warning("%s Said once for each layer; nc_stats counts such calls.", error)
    return False


@torch.compiler.disable
def record_dense(patch: LayerPatch, problem: Problem, phase: str) -> None:
    """Counts a call that attended every key."""
    whole = torch.ones((), device=problem.visible.device).expand(*problem.query.shape[:3], 2)
    patch.counters.mass[phase].add_bounds("dense", whole, problem.visible, 1 - patch.config.max_dropped_mass)


def find_drop(
    kept: torch.Tensor, problem: Problem, limit: float, *, layer: int, phase: str, certified: bool = True
) -> DroppedMassError | None:
    """The error that names where least is kept, if that is below ``limit``, else None; reads the device.

    ``kept`` is what every row is certain to keep, ``[B, Hq, Lq]``; or if not ``certified`` what the rows of each head
    are estimated to keep on average, ``[1, Hq, 1]``.
    """
    if kept.numel() == 0:
        return None
    least, at = kept.flatten().min(0)
    share = float(least)
    if share >= (limit if certified else limit - _ESTIMATE_ROUNDING):
        return None
    b, head, row = (int(i) for i in torch.unravel_index(at, kept.shape))
    mass, position = f"{share:.4f} of the dense softmax mass", None
    said = f": in a call of {phase} its rows keep by estimate {mass} on average"
    if certified:
        position = int(own_keys(problem.visible)[b, row] - problem.origin[b, row])
        said = f", position {position} of sequence {b}: in {phase} only {mass} is certain to be kept"
    message = (
        f"layer {layer}, head {head}{said}, less than 1 - max_dropped_mass = {limit:g}. Raise alpha, C or "
        'max_dropped_mass, leave the layer dense with dense_layers, or set on_drop="dense".'
    )
    return DroppedMassError(message, layer=layer, head=head, position=position, kept_mass=share, certified=certified)


def certified_bounds(result: AttentionResult, problem: Problem) -> torch.Tensor:
    """Limits between which the kept mass of every row lies, float32 ``[B, Hq, Lq, 2]``; does not read the device.

    ``result`` has ``attended``, and ``kept_mass_bounds`` or ``kept_mass`` as computed in float32. A query that sees no
    key keeps all.
    """
    bounds, visible = result.kept_mass_bounds, problem.visible
    if bounds is None:
        assert result.kept_mass is not None
        bounds = rounding_bounds(result.kept_mass, problem)
    assert result.attended is not None
    all_kept = result.attended >= (visible[..., 1] - visible[..., 0]).clamp(min=0)[:, None]
    return bounds.masked_fill(all_kept[..., None], 1.0)

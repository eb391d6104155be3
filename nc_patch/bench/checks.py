"""Whether what is timed is right: outputs of a case against the float64 reference, or the PyTorch backend beyond it.

The first sequence is compared, with all of its heads.
"""

from dataclasses import dataclass
from typing import Any

import torch

from nc_patch.bench.inputs import DecodeInputs
from nc_patch.config import NCConfig
from nc_patch.functional import budgets_of, sparse_attention
from nc_patch.ops.reference import AttentionResult, causal_intervals, reference_attention
from nc_patch.selections.index import KIND_OF, KeyIndex

# Up to this many keys the reference, which takes pages one by one, is computed.
REFERENCE_KEYS = 8192
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
# Rounded statistics may exchange the lightest page that is chosen for the heaviest that is not.
BLOCK_TOLERANCE = 0.1


@dataclass(frozen=True)
class Expected:
    """What a method should return for the first sequence.

    Attributes:
        output: float64 ``[1, Hq, 1, Dv]``. against: what computed it.
        attended: mean number of keys attended. kept_mass: mean share of the dense softmax that they hold.
    """

    output: torch.Tensor
    against: str
    attended: float | None
    kept_mass: float | None


def expected_output(inputs: DecodeInputs, selection: str, config: NCConfig) -> Expected:
    """The right output of a selection, ``"dense"`` included, for the first sequence."""
    query, key, value = inputs.query[:1], inputs.key[:1], inputs.value[:1]
    length, scale = key.shape[2], query.shape[-1] ** -0.5
    if selection == "dense" and length > REFERENCE_KEYS:
        heads = []
        for rows, keys, values in zip(query[0, :, 0].chunk(key.shape[1]), key[0], value[0], strict=True):
            weights = torch.softmax((rows.double() @ keys.double().T) * scale, -1)
            heads.append(weights @ values.double())
        return Expected(torch.cat(heads)[None, :, None], "float64", float(length), 1.0)
    if length <= REFERENCE_KEYS:
        query, key, value = query.cpu(), key.cpu(), value.cpu()
        visible = causal_intervals(1, 1, length, "cpu")
        reference = reference_attention(
            query,
            key,
            value,
            visible=visible,
            budget=budgets_of(config, 0, visible, length),
            selection="pages" if selection == "block" else selection,
            scale=scale,
            sink_keys=config.sink_keys,
            recent_keys=config.recent_keys,
            block_size=config.block_size,
            tail=selection == "topk" and config.tail == "mean",
        )
        return _expected(reference, "reference, float64")
    kind = KIND_OF.get(selection) if selection == "block" else None
    result = sparse_attention(
        query,
        key,
        value,
        alpha=config.alpha,  # type: ignore[arg-type]
        C=config.C,  # type: ignore[arg-type]
        selection=selection,  # type: ignore[arg-type]
        index=KeyIndex.build(key, kind, block_size=config.block_size, backend="torch") if kind else None,
        return_stats=True,
        block_size=config.block_size,
        tail=config.tail,
        backend="torch",
    )
    assert isinstance(result, AttentionResult)
    return _expected(result, "PyTorch backend")


def compare(output: torch.Tensor, expected: Expected, selection: str) -> dict[str, Any]:
    """How far an output ``[B, Hq, Lq, Dv]`` is off, as ``|out - right| / |right|``, and whether that is within reason.

    Returns:
        ``relative_error``, ``compared_with``, ``right``; wrong is also what is not finite anywhere.
    """
    right = expected.output.double().cpu()
    error = float((output[:1].double().cpu() - right).norm() / right.norm())
    tolerance = TOLERANCE[output.dtype]
    if selection == "block":
        tolerance = max(tolerance, BLOCK_TOLERANCE if output.dtype != torch.float32 else tolerance)
    finite = bool(output.isfinite().all())
    return {"relative_error": error, "compared_with": expected.against, "right": finite and error <= tolerance}


def _expected(result: AttentionResult, against: str) -> Expected:
    assert result.attended is not None
    assert result.kept_mass is not None
    return Expected(
        result.output.double(), against, float(result.attended.float().mean()), float(result.kept_mass.mean())
    )

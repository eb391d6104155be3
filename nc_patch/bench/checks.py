"""Whether what is timed is right: outputs of a case against the float64 reference, or the PyTorch backend beyond it.

The first sequence is compared, with all of its heads.
"""

from dataclasses import dataclass
from typing import Any

import torch

from nc_patch.bench.inputs import DecodeInputs
from nc_patch.config import NCConfig
from nc_patch.functional import sparse_attention
from nc_patch.ops.problem import AttentionResult, Problem, causal_intervals
from nc_patch.selections import Block, Dense
from nc_patch.selections.index import KeyIndex

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


def expected_output(inputs: DecodeInputs, config: NCConfig) -> Expected:
    """The right output of ``config.decode``, dense included, for the first sequence."""
    query, key, value = inputs.query[:1], inputs.key[:1], inputs.value[:1]
    length, scale, selection = key.shape[2], query.shape[-1] ** -0.5, config.decode
    if isinstance(selection, Dense) and length > REFERENCE_KEYS:
        heads = []
        for rows, keys, values in zip(query[0, :, 0].chunk(key.shape[1]), key[0], value[0], strict=True):
            weights = torch.softmax((rows.double() @ keys.double().T) * scale, -1)
            heads.append(weights @ values.double())
        return Expected(torch.cat(heads)[None, :, None], "float64", float(length), 1.0)
    if length <= REFERENCE_KEYS:
        visible = causal_intervals(1, 1, length, "cpu")
        of_sequence = (visible, visible[..., 0].contiguous(), config.row_budgets(visible, length, 0))
        problem = Problem(query.cpu(), key.cpu(), value.cpu(), *of_sequence, scale=scale, stats=True)
        return expected(selection.reference(problem, decode=True), "reference, float64")
    index = None
    if isinstance(selection, Block):
        index = KeyIndex.build(key, "pages", block_size=selection.size, backend="torch")
    result = sparse_attention(
        *(query, key, value),
        alpha=config.alpha,  # type: ignore[arg-type]
        C=config.C,  # type: ignore[arg-type]
        selection=selection,
        index=index,
        return_stats=True,
        backend="torch",
    )
    assert isinstance(result, AttentionResult)
    return expected(result, "PyTorch backend")


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


def expected(result: AttentionResult, against: str) -> Expected:
    """What a method should return, from attention with statistics that ``against`` computed."""
    assert result.attended is not None
    assert result.kept_mass is not None
    attended, kept_mass = float(result.attended.float().mean()), float(result.kept_mass.mean())
    return Expected(result.output.double(), against, attended, kept_mass)

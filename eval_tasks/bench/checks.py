"""Whether what is timed is right: some rows of the first sequence, all heads, against the float64 reference.

Beyond a size the PyTorch backend is what outputs are compared with; where it is what is timed, that shows no more than
that rows do not depend on each other.
"""

from dataclasses import dataclass
from typing import Any

import torch

from eval_tasks.bench.inputs import Inputs
from nc_patch.config import NCConfig
from nc_patch.functional import sparse_attention
from nc_patch.ops.problem import AttentionResult, Problem
from nc_patch.selections import Block
from nc_patch.selections.index import KeyIndex

# Up to so many keys, and scores of the compared rows, the reference, which stores them several times over, is computed.
REFERENCE_KEYS, REFERENCE_SCORES = 8192, 1 << 25
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
# Rounded statistics may exchange the lightest page that is chosen for the heaviest that is not.
BLOCK_TOLERANCE = 0.1
_CHECKED_BLOCKS = 4


@dataclass(frozen=True)
class Expected:
    """What a method should return for the first sequence: ``[1, Hq, R, Dv]`` of the queries ``rows``, ``[R]``.

    ``against`` names what computed it; the other two are means over rows: of keys, and of the dense softmax they hold.
    """

    output: torch.Tensor
    rows: torch.Tensor
    against: str
    attended: float
    kept_mass: float


def checked_rows(queries: int, query_block_size: int) -> torch.Tensor:
    """The rows that are compared, int64: the first query block, the last, and two between."""
    blocks = -(-queries // query_block_size)
    numbers = sorted({(blocks - 1) * part // (_CHECKED_BLOCKS - 1) for part in range(_CHECKED_BLOCKS)})
    rows = torch.cat([torch.arange(query_block_size) + number * query_block_size for number in numbers])
    return rows[rows < queries]


def expected_output(inputs: Inputs, config: NCConfig, phase: str, rows: torch.Tensor) -> Expected:
    """The right output of these queries by the selection of ``config`` for a phase, dense included."""
    selection = getattr(config, phase)
    query, key, value = inputs.query[:1, :, rows.to(inputs.query.device)], inputs.key[:1], inputs.value[:1]
    visible, n = inputs.visible()[:1, rows.to(query.device)].contiguous(), key.shape[2]
    if n <= REFERENCE_KEYS and query.shape[1] * len(rows) * n <= REFERENCE_SCORES:
        query, key, value, visible = (tensor.cpu() for tensor in (query, key, value, visible))
        origin, budget = visible[..., 0].contiguous(), config.row_budgets(visible, n, 0)
        problem = Problem(query, key, value, visible, origin, budget, scale=query.shape[-1] ** -0.5, stats=True)
        result, against = selection.reference(problem, decode=phase == "decode"), "reference, float64"
    else:
        index = None
        if phase == "decode" and isinstance(selection, Block):
            index = KeyIndex.build(key, "pages", block_size=selection.size, backend="torch")
        settings: dict[str, Any] = {"alpha": config.alpha, "C": config.C, "dense_below": config.dense_below}
        settings |= {"selection": selection, "visible": visible, "index": index, "backend": "torch"}
        result, against = sparse_attention(query, key, value, **settings, return_stats=True), "PyTorch backend"
    assert isinstance(result, AttentionResult)
    assert result.attended is not None
    assert result.kept_mass is not None
    attended, kept_mass = float(result.attended.double().mean()), float(result.kept_mass.double().mean())
    return Expected(result.output, rows, against, attended, kept_mass)


def compare(output: torch.Tensor, expected: Expected, method: str) -> dict[str, Any]:
    """How far an output ``[B, Hq, Lq, Dv]`` is off, ``|out - right| / |right|``, and whether it is right and finite."""
    right = expected.output.double().cpu()
    found = output[:1, :, expected.rows.to(output.device)].double().cpu()
    error = float((found - right).norm() / right.norm())
    rounded = method == "block" and output.dtype != torch.float32
    tolerance = BLOCK_TOLERANCE if rounded else TOLERANCE[output.dtype]
    is_right = bool(output.isfinite().all()) and error <= tolerance
    return {"relative_error": error, "compared_with": expected.against, "right": is_right}

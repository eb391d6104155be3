"""Whether what is timed is right: some rows of the first sequence, all heads, against the PyTorch backend."""

from dataclasses import dataclass
from typing import Any

import torch

from eval_tasks.bench.inputs import Inputs
from nc_patch.config import NCConfig
from nc_patch.functional import sparse_attention
from nc_patch.ops.problem import AttentionResult
from nc_patch.selections import Block
from nc_patch.selections.index import KeyIndex

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
# Rounded statistics may exchange the lightest page that is chosen for the heaviest that is not.
BLOCK_TOLERANCE = 0.1
_CHECKED_BLOCKS = 4


@dataclass(frozen=True)
class Expected:
    """What a method should return for the first sequence: ``[1, Hq, R, Dv]`` of the queries ``rows``, ``[R]``.

    The other two are means over rows: of the keys attended, and of the dense softmax that they hold.
    """

    output: torch.Tensor
    rows: torch.Tensor
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
    selection, at, index = getattr(config, phase), rows.to(inputs.query.device), None
    query, key, value = inputs.query[:1, :, at], inputs.key[:1], inputs.value[:1]
    if phase == "decode" and isinstance(selection, Block):
        index = KeyIndex.build(key, "pages", block_size=selection.size, backend="torch")
    settings: dict[str, Any] = {"alpha": config.alpha, "C": config.C, "dense_below": config.dense_below}
    settings |= {"selection": selection, "visible": inputs.visible()[:1, at].contiguous(), "index": index}
    result = sparse_attention(query, key, value, **settings, backend="torch", return_stats=True)
    assert isinstance(result, AttentionResult)
    assert result.attended is not None
    assert result.kept_mass is not None
    return Expected(
        result.output, rows, float(result.attended.double().mean()), float(result.kept_mass.double().mean())
    )


def compare(output: torch.Tensor, expected: Expected, method: str) -> tuple[float, bool]:
    """How far an output ``[B, Hq, Lq, Dv]`` is off, ``|out - right| / |right|``, and whether it is right and finite."""
    right = expected.output.double().cpu()
    found = output[:1, :, expected.rows.to(output.device)].double().cpu()
    error = float((found - right).norm() / right.norm())
    rounded = method == "block" and output.dtype != torch.float32
    tolerance = BLOCK_TOLERANCE if rounded else TOLERANCE[output.dtype]
    return error, bool(output.isfinite().all()) and error <= tolerance

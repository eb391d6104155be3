"""Whether what is timed is right: some rows of the first sequence, all heads, against the PyTorch backend."""

from typing import Any

import torch

from eval_tasks.bench.inputs import Inputs
from nc_patch.config import NCConfig
from nc_patch.functional import sparse_attention
from nc_patch.ops.problem import AttentionResult, causal_intervals
from nc_patch.selections import Block
from nc_patch.selections.index import KeyIndex

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
# Rounded statistics may exchange the lightest page that is chosen for the heaviest that is not.
BLOCK_TOLERANCE = 0.1
_CHECKED_BLOCKS = 4


def checked_rows(queries: int, query_block_size: int) -> torch.Tensor:
    """The rows that are compared, int64 ``[R]``: the first query block, the last, and two between."""
    blocks = torch.linspace(0, -(-queries // query_block_size) - 1, _CHECKED_BLOCKS).long().unique()
    rows = (blocks[:, None] * query_block_size + torch.arange(query_block_size)).flatten()
    return rows[rows < queries]


def expected_output(inputs: Inputs, config: NCConfig, phase: str, rows: torch.Tensor) -> AttentionResult:
    """What the selection of ``config`` for a phase should return for the first sequence, ``[1, Hq, R, Dv]``."""
    selection, at, index = getattr(config, phase), rows.to(inputs.query.device), None
    query, key, value = inputs.query[:1, :, at], inputs.key[:1], inputs.value[:1]
    if phase == "decode" and isinstance(selection, Block):
        index = KeyIndex.build(key, "pages", block_size=selection.size, backend="torch")
    settings: dict[str, Any] = {"alpha": config.alpha, "C": config.C, "dense_below": config.dense_below}
    visible = causal_intervals(1, inputs.query.shape[2], key.shape[2], key.device)[:, at].contiguous()
    settings |= {"selection": selection, "visible": visible, "index": index}
    result = sparse_attention(query, key, value, **settings, backend="torch", return_stats=True)
    assert isinstance(result, AttentionResult)
    return result


def compare(output: torch.Tensor, right: torch.Tensor, rows: torch.Tensor, method: str) -> tuple[float, bool]:
    """How far an output ``[B, Hq, Lq, Dv]`` is off, ``|out - right| / |right|``, and whether it is right and finite."""
    found, right = output[:1, :, rows.to(output.device)].double().cpu(), right.double().cpu()
    error = float((found - right).norm() / right.norm())
    rounded = method == "block" and output.dtype != torch.float32
    tolerance = BLOCK_TOLERANCE if rounded else TOLERANCE[output.dtype]
    return error, bool(output.isfinite().all()) and error <= tolerance

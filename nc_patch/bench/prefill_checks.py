"""Whether what is timed in prefill is right: rows of four query blocks of the first sequence, with all heads.

A query block chooses and attends for itself, so that some of them are computed as if the others were not there. They
are compared with the float64 reference where the prompt is short; beyond that sparse attention is compared with the
PyTorch backend, which where it is what is timed shows no more than that rows do not depend on each other, and dense
attention with float64 products of these rows with all keys.
"""

import torch

from nc_patch.bench.checks import Expected, expected
from nc_patch.bench.prompts import PromptInputs
from nc_patch.config import NCConfig
from nc_patch.functional import attend
from nc_patch.selections import Dense

# Up to this many scores of the compared rows the reference, which stores them several times over, is computed.
REFERENCE_SCORES = 1 << 25
_CHECKED_BLOCKS = 4


def checked_rows(length: int, query_block_size: int) -> torch.Tensor:
    """The rows that are compared, int64: the first query block, the last, and two between."""
    blocks = -(-length // query_block_size)
    numbers = sorted({(blocks - 1) * part // (_CHECKED_BLOCKS - 1) for part in range(_CHECKED_BLOCKS)})
    rows = torch.cat([torch.arange(query_block_size) + number * query_block_size for number in numbers])
    return rows[rows < length]


def expected_rows(inputs: PromptInputs, config: NCConfig, rows: torch.Tensor) -> Expected:
    """The right output ``[1, Hq, len(rows), Dv]`` of ``config.prefill``, dense included."""
    selection = config.prefill
    query = inputs.query[:1].index_select(2, rows.to(inputs.query.device))
    first = PromptInputs(query, inputs.key[:1], inputs.value[:1])
    is_short = query.shape[1] * len(rows) * first.key.shape[2] <= REFERENCE_SCORES
    if isinstance(selection, Dense) and not is_short:
        return _dense(query, first.key, first.value, rows)
    if is_short:
        first = PromptInputs(query.cpu(), first.key.cpu(), first.value.cpu())
        return expected(selection.reference(first.problem(config, rows)), "reference, float64")
    return expected(attend(first.problem(config, rows)._replace(stats=True), selection, "torch"), "PyTorch backend")


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor) -> Expected:
    """Query block after query block and head after head, so that scores of few rows are there at a time."""
    group, scale = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5
    output = torch.empty(*query.shape[:3], value.shape[-1], dtype=torch.float64, device=query.device)
    for places in torch.arange(len(rows)).split(32):
        last = int(rows[places].max()) + 1
        hidden = torch.arange(last, device=query.device) > rows[places].to(query.device)[:, None]
        for h in range(key.shape[1]):
            heads = slice(h * group, (h + 1) * group)
            few = query[0, heads, places[0] : places[-1] + 1].double()
            scores = (few @ key[0, h, :last].double().T * scale).masked_fill_(hidden, -torch.inf)
            output[0, heads, places[0] : places[-1] + 1] = torch.softmax(scores, -1) @ value[0, h, :last].double()
    return Expected(output, "float64", float(rows.float().mean()) + 1, 1.0)

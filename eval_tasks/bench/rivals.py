"""Dense attention by every backend of ``scaled_dot_product_attention``: the rivals of sparse attention.

Each backend runs in two forms: ``gqa``, as it is called in a model, and one that spares it the repeating of keys. With
one query per sequence that is ``rows``, where the query heads of a group stand as rows of one head; for a prompt it is
``expanded``, over keys and values that are repeated beforehand, which is not timed.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from eval_tasks.bench.inputs import Inputs
from eval_tasks.bench.timing import Step

_GPU_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_BACKENDS = {"cpu": {"flash": SDPBackend.FLASH_ATTENTION}, "cuda": _GPU_BACKENDS}
# Up to so many keys PyTorch's plain implementation, which stores all scores of a prompt, is tried.
_MATH_KEYS = 4096


def rivals(sets: Sequence[Inputs]) -> dict[str, Step]:
    """A step of each implementation by name, the plain one last; the first step raises where there is no kernel."""
    query, key = sets[0].query, sets[0].key
    decodes, backends = query.shape[2] == 1, dict(_BACKENDS[query.device.type])
    if decodes or key.shape[2] <= _MATH_KEYS:
        backends["math"] = SDPBackend.MATH
    forms = ("gqa", "rows" if decodes else "expanded")
    return {f"sdpa {name}, {form}": partial(_step, sets, backends[name], form) for name in backends for form in forms}


def _step(sets: Sequence[Inputs], backend: SDPBackend, form: str, i: int) -> torch.Tensor:
    query, keys, values = sets[i].query, *(sets[i].expanded if form == "expanded" else (sets[i].key, sets[i].value))
    rows = query.view(*keys.shape[:2], -1, keys.shape[-1]) if form == "rows" else query
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(
            rows, keys, values, is_causal=query.shape[2] > 1, enable_gqa=rows.shape[1] != keys.shape[1]
        ).view(query.shape)

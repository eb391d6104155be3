"""Dense attention by every backend of ``scaled_dot_product_attention``: the rivals of sparse attention.

Each backend runs in two forms: ``gqa``, as it is called in a model, and one that spares it the repeating of keys. With
one query per sequence that is ``rows``, where the query heads of a group stand as rows of one head; for a prompt it is
``expanded``, over keys and values that are repeated beforehand, which is not timed.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from eval_tasks.bench.inputs import Inputs
from eval_tasks.bench.timing import Step

Make = Callable[[Sequence[Inputs]], Step]
# "math" is the last, since it takes so much memory that little may be left for others.
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Above this many keys PyTorch's plain implementation, which stores all scores of a prompt, is not tried.
_MATH_KEYS = 4096


class Absent(Exception):
    """The implementation is not made for this device or these inputs."""


def rivals(phase: str) -> dict[str, Make]:
    """By name, what makes a step of each implementation from the sets of inputs; it, or the first step, may raise.

    The phase is ``"decode"``, one query a sequence, or ``"prefill"``, whole prompts.
    """
    forms = ("gqa", "rows" if phase == "decode" else "expanded")
    return {f"sdpa {b}, {form}": partial(_sdpa, backend=b, form=form) for b, form in product(_BACKENDS, forms)}


def _sdpa(sets: Sequence[Inputs], backend: str, form: str) -> Step:
    query, key = sets[0].query, sets[0].key
    causal, grouped = query.shape[2] > 1, form == "gqa" and query.shape[1] != key.shape[1]
    if query.device.type == "cpu" and backend in ("cudnn", "efficient"):
        raise Absent(f"the {backend} backend needs a GPU")
    if causal and backend == "math" and key.shape[2] > _MATH_KEYS:
        raise Absent(f"it stores all scores, which is tried up to {_MATH_KEYS:,} keys")
    if form == "expanded" and query.shape[1] == key.shape[1]:
        raise Absent("every head has keys of its own: the same as gqa")

    def step(i: int) -> torch.Tensor:
        one = sets[i]
        rows = one.query.view(*one.key.shape[:2], -1, one.key.shape[-1]) if form == "rows" else one.query
        keys, values = one.expanded if form == "expanded" else (one.key, one.value)
        with sdpa_kernel(_BACKENDS[backend]):
            output = scaled_dot_product_attention(rows, keys, values, is_causal=causal, enable_gqa=grouped)
        return output.view(one.query.shape) if form == "rows" else output

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            step(0)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "No available kernel" not in str(error):
                raise
            reasons = [str(warning.message).split(" (Triggered")[0].strip() for warning in said]
            raise Absent("; ".join(["no kernel for this input", *reasons])[:600]) from error
    return step

"""What an observer of attention gets to see."""

from typing import NamedTuple

import torch


class Observed(NamedTuple):
    """One call of attention, as an observer sees it.

    Attributes:
        layer: index of the layer.
        query: ``[B, Hq, Lq, D]``. key: ``[B, Hkv, Lk, D]``. value: ``[B, Hkv, Lk, Dv]``.
        visible: int32 ``[B, Lq, 2]``.
        scale: factor of the scores. softcap, sinks: as ``sparse_attention`` takes them.
        output: ``[B, Hq, Lq, Dv]``, which goes on through the model.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None
    output: torch.Tensor

"""A logarithmic budget, o(n^C) for every C > 0: the paper's counter-example, as a baseline to compare with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nc_patch.config import NCConfig


def log_budgets(n: np.ndarray, factor: float, min_keys: int = 1) -> np.ndarray:
    """Keys of queries that see ``n`` each, ``min(n, max(min_keys, ceil(factor * log2(n))))``, int64 as ``n``."""
    raw = np.ceil(np.minimum(factor * np.log2(np.maximum(n, 1)), n)).astype(np.int64)
    return np.asarray(np.minimum(n, np.maximum(min_keys, raw)))


@dataclass(frozen=True, init=False)
class LogConfig(NCConfig):
    """Settings of attention over ``ceil(alpha * log2(n))`` keys instead of ``ceil(alpha * n**C)``; ``C`` has no use.

    Every query has the budget of the keys that it sees. Neither ``torch.compile`` nor files know this law.
    """

    def budget(self, n: int | torch.Tensor, layer: int | None = None, head: int | None = None) -> Any:
        assert isinstance(self.alpha, float)
        if isinstance(n, int):
            return int(log_budgets(np.array(n), self.alpha, self.min_keys))
        return torch.from_numpy(log_budgets(n.cpu().numpy(), self.alpha, self.min_keys)).to(n.device, torch.int32)

    def _row_budgets(self, visible: torch.Tensor, max_n: int, laws: Sequence[tuple[float, float]]) -> torch.Tensor:
        table = self.budget(torch.arange(max_n + 1)).to(visible.device)
        return table[(visible[..., 1] - visible[..., 0]).long()][:, None]

    def largest_budget(self, n: int, layer: int | None = None) -> int:
        return int(self.budget(n))

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"law": "log"}

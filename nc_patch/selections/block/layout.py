"""What the key index of ``block`` holds: statistics of each run of ``block_size`` keys."""

from typing import ClassVar

import torch

from nc_patch.selections.block.pages import VECTORS, PageStatistics, page_count, update_pages_
from nc_patch.selections.index import layout


@layout("pages")
class Pages:
    """One key and the mean and variance of the others of each page, in 8-bit codes: see ``pages``."""

    names: ClassVar = ("page_codes", "page_scales")
    fixed: ClassVar = ()
    paged: ClassVar = True
    takes_values: ClassVar = False
    pays_on: ClassVar = ("triton", "torch")

    @staticmethod
    def rows(capacity: int, block_size: int) -> int:
        """One for each page."""
        return page_count(capacity, block_size)

    @staticmethod
    def allocate(
        key: torch.Tensor, value: torch.Tensor | None, ends: tuple[torch.Tensor, torch.Tensor], rows: int
    ) -> list[torch.Tensor]:
        """Zeros."""
        B, Hkv, _, D = key.shape
        codes = torch.zeros(B, Hkv, rows, VECTORS, D, dtype=torch.int8, device=key.device)
        return [codes, torch.zeros(B, Hkv, rows, VECTORS, dtype=torch.float32, device=key.device)]

    @staticmethod
    def write(
        index: list[torch.Tensor], tensors: list[torch.Tensor], count: int, block_size: int, backend: str
    ) -> None:
        """Summarises each whole page that holds a new key."""
        key, origin, first, end = tensors
        if backend == "triton":
            from nc_patch.selections.block.summarize import triton_summarize_pages_

            triton_summarize_pages_(key, origin, first, count, end, PageStatistics(*index), block_size)
        else:
            update_pages_(key, origin, first, count, end, PageStatistics(*index), block_size)

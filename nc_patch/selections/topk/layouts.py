"""What the key indexes of ``topk`` hold: codes that bound scores, and means of pages of keys and values."""

from typing import ClassVar

import torch

from nc_patch.ops.means import TAIL_PAGE_SIZE, PageMeans, page_means, touched_slots
from nc_patch.selections.index import Layout
from nc_patch.selections.topk.codes import KeyCodes, channel_moments, encode_keys_


class Codes(Layout, kind="codes"):
    """One byte an element and eight a key besides, which bound every score: see ``codes``."""

    growing: ClassVar = 3
    # PyTorch has no product of bytes and floats: there codes cost more than they save.
    pays_on: ClassVar = ("triton", "cpu")

    @staticmethod
    def allocate(
        key: torch.Tensor, value: torch.Tensor | None, ends: tuple[torch.Tensor, torch.Tensor], rows: int
    ) -> list[torch.Tensor]:
        """Zeros, and the moments of the channels."""
        B, Hkv, _, D = key.shape
        of_keys = [key.new_zeros(B, Hkv, rows, D, dtype=torch.int8)]
        of_keys += [key.new_zeros(B, Hkv, rows, dtype=torch.float32) for _ in range(2)]
        return [*of_keys, *channel_moments(key, *ends)]

    @staticmethod
    def write(
        index: list[torch.Tensor], tensors: list[torch.Tensor], count: int, block_size: int, backend: str
    ) -> None:
        """Encodes new keys; positions that do not exist are left out."""
        key, origin, first, _ = tensors
        encode = encode_keys_
        if backend == "cpu":
            from nc_patch.selections.topk.cpu_decode import cpu_take_in_

            cpu_take_in_(key, key, origin, first, count, codes=index)
            return
        if backend == "triton":
            from nc_patch.selections.topk.encode import triton_encode_keys_ as encode
        encode(key, first, count, KeyCodes(*index))


class Means(Layout, kind="means"):
    """The mean key and the mean value of each page of 16, by which keys that are not attended count."""

    span: ClassVar = TAIL_PAGE_SIZE
    takes_values: ClassVar = True

    @staticmethod
    def allocate(
        key: torch.Tensor, value: torch.Tensor | None, ends: tuple[torch.Tensor, torch.Tensor], rows: int
    ) -> list[torch.Tensor]:
        """Zeros."""
        assert value is not None
        return [t.new_zeros(*t.shape[:2], rows, t.shape[3]) for t in (key, value)]

    @staticmethod
    def write(
        index: list[torch.Tensor], tensors: list[torch.Tensor], count: int, block_size: int, backend: str
    ) -> None:
        """Averages each page that holds a new key; one that is not full yet is overwritten when it is."""
        key, origin, first, _, value = tensors
        average = page_means
        if backend == "cpu":
            from nc_patch.selections.topk.cpu_decode import cpu_take_in_

            cpu_take_in_(key, value, origin, first, count, means=PageMeans(*index))
            return
        if backend == "triton":
            from nc_patch.ops.triton.means import triton_page_means as average
        slots = index[0].shape[2]
        touched = touched_slots(count, slots)
        begin = origin.long() % TAIL_PAGE_SIZE
        # Means depend on the page alone, so that writing one twice, where a slot is clamped, does no harm.
        slot = torch.div(first.long() - begin, TAIL_PAGE_SIZE, rounding_mode="floor").clamp(0, slots - touched)
        at = slot[:, None] + torch.arange(touched, device=key.device)
        for kept, new in zip(index, average(key, value, at * TAIL_PAGE_SIZE + begin[:, None]), strict=True):
            kept.scatter_(2, at[:, None, :, None].expand_as(new), new)

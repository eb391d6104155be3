"""Pages: runs of ``block_size`` keys from the sequence's origin on, and the statistics that decoding chooses by.

A page's share of a query's softmax is estimated from one of its keys, the one that lies farthest from the page's mean,
and from the mean and the variance of the others. If these were normal with independent channels, the mean of their
``exp(s * q.k)`` would be ``exp(s * q.mean + s^2 / 2 * sum(q^2 * variance))``. All three vectors are kept as 8-bit codes
with one scale each, and follow from the keys of the page alone: an index that is kept and one that is built anew choose
the same pages.
"""

from typing import ClassVar, NamedTuple

import torch

from nc_patch.common import LARGEST_INTEGER, check_choice
from nc_patch.ops.problem import DTYPES, Problem, check_int32, describe
from nc_patch.selections.block.blocks import BLOCK_SIZES
from nc_patch.selections.index import Layout

# The rows of PageStatistics.codes: the key apart, mean and variance of the others.
VECTORS = 3
LARGEST_CODE = 127.0
_EXPONENT_BITS = 0x7F800000
_SMALLEST = torch.finfo(torch.float32).tiny
# Keys that are summarised at once, to bound the memory.
_KEYS_AT_ONCE = 8192


class PageStatistics(NamedTuple):
    """Statistics of each page: the key apart, the mean and the variance of the other keys.

    Attributes:
        codes: int8 ``[B, Hkv, P, 3, D]``, of the variance from 0 to 127, of the others from -127 to 127.
        scales: float32 ``[B, Hkv, P, 3]``. The key apart is ``codes[..., 0, :] * scales[..., 0]``, the mean is
            ``codes[..., 1, :] * scales[..., 1]`` and the variance ``codes[..., 2, :] * scales[..., 2] ** 2``. NaN, all
            three, where a key of the page holds NaN or infinity.
    """

    codes: torch.Tensor
    scales: torch.Tensor


def check_pages(key: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, pages: int) -> None:
    """Raises ValueError unless there are statistics of so many pages for each sequence, or block, and head of keys."""
    shape = (*key.shape[:2], pages, VECTORS)
    for name, tensor, dtype, wanted in (
        ("page_codes", codes, torch.int8, (*shape, key.shape[3])),
        ("page_scales", scales, torch.float32, shape),
    ):
        if tensor.dtype != dtype or tensor.shape != wanted or tensor.device != key.device:
            raise ValueError(f"{name} must be {dtype} {list(wanted)} on {key.device}, got {describe(tensor)}")


def check_blocks(
    key: torch.Tensor, value: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, page_size: int
) -> None:
    """Raises ValueError unless keys and values in blocks of memory fit each other, their statistics and the pages."""
    check_choice("page_size", page_size, BLOCK_SIZES)
    fits = key.ndim == value.ndim == 4 and key.shape[:3] == value.shape[:3] and key.dtype in DTYPES
    if not fits or (value.dtype, value.device) != (key.dtype, key.device):
        raise ValueError(
            "key must be [blocks, Hkv, N, D] and value [blocks, Hkv, N, Dv], both bfloat16, float16 or float32, got "
            f"{describe(key)} and {describe(value)}"
        )
    if key.shape[2] == 0 or key.shape[2] % page_size:
        raise ValueError(f"a block must hold a multiple of page_size {page_size} keys, got {key.shape[2]}")
    if len(key) * key.shape[2] > LARGEST_INTEGER:
        raise ValueError(f"blocks can hold at most {LARGEST_INTEGER} keys, got {len(key)} of {key.shape[2]}")
    check_pages(key, codes, scales, key.shape[2] // page_size)
    ends = {"key": (1,), "value": (1,), "page_codes": (key.shape[3], 1), "page_scales": (1,)}
    for (name, end), tensor in zip(ends.items(), (key, value, codes, scales), strict=True):
        if tensor.stride()[-len(end) :] != end:
            raise ValueError(f"{name} must have strides that end with {list(end)}, got {list(tensor.stride())}")


def check_table(problem: Problem) -> None:
    """Raises ValueError unless the tensors of a problem with a table fit each other."""
    query, key, value, table = problem.query, problem.key, problem.value, problem.table
    assert table is not None
    codes, scales = problem.key_index
    check_blocks(key, value, codes, scales, problem.page_size)
    (_, Hkv, _, D), device = key.shape, key.device
    fits = query.ndim == 4 and query.shape[3] == D and query.shape[1] > 0 and query.shape[1] % Hkv == 0
    if not fits or (query.dtype, query.device) != (key.dtype, device):
        raise ValueError(
            f"query must be {key.dtype} [R, Hq, {D}] on {device}, Hq a multiple of {Hkv} key/value heads, got "
            f"{describe(query[:, :, 0])}"
        )
    R, Hq = query.shape[:2]
    check_int32("table", table, (R, *table.shape[1:2]), device)
    check_int32("lengths", problem.visible[..., 0], (R,), device)
    check_int32("budget", problem.budget[..., 0], (R, 1 if problem.budget.shape[1:2] == (1,) else Hq), device)
    if problem.sinks is not None and (problem.sinks.shape != (Hq,) or problem.sinks.device != device):
        raise ValueError(f"sinks must be [{Hq}] on {device}, got {describe(problem.sinks)}")


def summarize(keys: torch.Tensor, exists: torch.Tensor | None = None) -> PageStatistics:
    """Statistics of pages given by their keys, in float32; this is their definition.

    Args:
        keys: ``[..., n, D]``, the n keys of each page.
        exists: bool ``[..., n]``, which of them there are; by default all.

    Returns:
        Codes int8 ``[..., 3, D]`` and scales float32 ``[..., 3]``; zero for a page without keys. Of keys equally far
        from the mean the first is apart. A page of one key has no others: their mean and variance are zero.
    """
    exists = torch.ones(keys.shape[:-1], dtype=torch.bool, device=keys.device) if exists is None else exists
    keys = torch.where(exists[..., None], keys.float(), 0.0)
    largest = keys.abs().amax((-2, -1))
    sound = largest.isfinite()
    # Numbers near one, whose squares neither overflow nor vanish; a power of two rounds nothing.
    unit = (largest.view(torch.int32) & _EXPONENT_BITS).view(torch.float32).clamp(min=_SMALLEST)
    keys = torch.where(sound[..., None, None], keys / unit[..., None, None], 0.0)
    count = exists.sum(-1, keepdim=True)
    distance = (keys - keys.sum(-2, keepdim=True) / count.clamp(min=1)[..., None]).square().sum(-1)
    far = torch.where(exists, distance, -1.0).argmax(-1, keepdim=True)
    other = (torch.arange(keys.shape[-2], device=keys.device) != far) & exists
    others = (count - 1).clamp(min=1)
    mean = torch.where(other[..., None], keys, 0.0).sum(-2) / others
    variance = torch.where(other[..., None], keys - mean[..., None, :], 0.0).square().sum(-2) / others
    apart = keys.gather(-2, far[..., None].expand(*far.shape, keys.shape[-1]))[..., 0, :]
    vectors = torch.stack((apart, mean, variance), -2)
    step = vectors.abs().amax(-1) / LARGEST_CODE
    codes = torch.floor(vectors / torch.where(step > 0, step, 1.0)[..., None] + 0.5)
    # The root of the variance's, which has the range of the keys.
    scales = torch.cat((step[..., :2], step[..., 2:].sqrt()), -1) * unit[..., None]
    return PageStatistics(
        codes.clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8), torch.where(sound[..., None], scales, torch.nan)
    )


def update_pages_(
    key: torch.Tensor, origin: torch.Tensor, first: torch.Tensor, count: int, end: torch.Tensor,
    statistics: PageStatistics, block_size: int,
) -> None:  # fmt: skip
    """Writes, in place, the statistics of each whole page that holds any of the keys ``first[b]`` on to ``+ count``.

    A page is whole once its last key is there; before, no query chooses by it. Pages beyond the statistics' are left
    out. ``key`` is ``[B, Hkv, N, D]``; origin, first and end are int ``[B]``, and are read on the host.
    """
    N, P = key.shape[2], statistics.codes.shape[2]
    at_once = max(1, _KEYS_AT_ONCE // block_size)
    for b, (begin, changed, stop) in enumerate(zip(origin.tolist(), first.tolist(), end.tolist(), strict=True)):
        low = max(changed - begin, 0) // block_size
        high = min((min(stop, N, changed + count + block_size - 1) - begin) // block_size, P)
        for page in range(low, high, at_once):
            upto = min(page + at_once, high)
            at, until = begin + page * block_size, begin + upto * block_size
            keys = key[b, :, max(at, 0) : max(until, 0)]
            # Of a sequence whose first keys were dropped they are missing.
            keys = torch.nn.functional.pad(keys, (0, 0, until - at - keys.shape[1], 0))
            exists = torch.arange(at, until, device=key.device).view(-1, block_size) >= 0
            new = summarize(keys.unflatten(1, exists.shape), exists)
            for kept, written in zip(statistics, new, strict=True):
                kept[b, :, page:upto] = written


def page_logits(
    query: torch.Tensor, statistics: PageStatistics, count: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Log of the sum of ``exp(score)`` over each page's keys, as estimated: ``[..., R, P]``.

    Args:
        query: ``[..., R, D]``, in the dtype to calculate in, which must hold squares of its elements times ``scale``.
        statistics: codes ``[..., P, 3, D]`` and scales ``[..., P, 3]``.
        count: int ``[P]``, how many keys of each page are seen, at least one.
        softcap: is applied to both parts of the estimate.
    """
    rows, pages = query.shape[-2], statistics.codes.shape[-3]
    query = query * scale
    codes = statistics.codes.to(query.dtype).flatten(-3, -2)
    products = torch.cat((query, 0.5 * query.square()), -2) @ codes.transpose(-1, -2)
    products = products.unflatten(-1, (pages, VECTORS))
    apart, mean, deviation = statistics.scales.to(query.dtype)[..., None, :, :].unbind(-1)
    far = products[..., :rows, :, 0] * apart
    rest = products[..., :rows, :, 1] * mean + products[..., rows:, :, 2] * deviation * deviation
    if softcap:
        far, rest = (softcap * torch.tanh(x / softcap) for x in (far, rest))
    return torch.logaddexp(far, rest + (count - 1).to(query.dtype).log())


class Pages(Layout, kind="pages"):
    """What the key index of ``block`` holds: ``PageStatistics``, of which none is kept for a page that is not whole."""

    paged: ClassVar = True

    @staticmethod
    def allocate(
        key: torch.Tensor, value: torch.Tensor | None, ends: tuple[torch.Tensor, torch.Tensor], rows: int
    ) -> list[torch.Tensor]:
        """Zeros."""
        shape = (*key.shape[:2], rows, VECTORS)
        return [key.new_zeros(*shape, key.shape[3], dtype=torch.int8), key.new_zeros(shape, dtype=torch.float32)]

    @staticmethod
    def write(
        index: list[torch.Tensor], tensors: list[torch.Tensor], count: int, block_size: int, backend: str
    ) -> None:
        """Summarises each whole page that holds a new key."""
        key, origin, first, end = tensors
        update = update_pages_
        if backend == "triton":
            from nc_patch.selections.block.summarize import triton_summarize_pages_ as update
        elif backend == "cpu":
            from nc_patch.selections.block.cpu_decode import cpu_summarize_pages_ as update
        update(key, origin, first, count, end, PageStatistics(*index), block_size)

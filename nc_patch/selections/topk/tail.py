"""The tail of ``topk`` while decoding: the means of all pages as further parts of each row's softmax.

``tail.py`` defines the tail. ``gather_kernel`` counts how many keys of each page a row attends, in an array that
``guess_kernel`` zeroed; ``tail_kernel`` reads every page's mean key and mean value once for the rows of a key/value
head and leaves partial sums behind those of the attended keys, which ``combine_splits`` joins with them. One more
launch.

Bytes, for a key/value head with n keys and G rows: n / 16 * (D + Dv) * 2 in bfloat16 for the means, and n / 16 * 4 * G
for the counts, written and read once each.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from nc_patch.ops.means import PageMeans, slot_count
from nc_patch.ops.triton.attend import fold, logits_base2
from nc_patch.ops.triton.launch import Tiles, addressable, architecture_of, compile_options, tail_constants, tiles_for
from nc_patch.ops.triton.specialise import DTYPE_NAMES, Specialisation, data_strides, pointer_to
from nc_patch.ops.triton.split import share
from nc_patch.ops.triton.tail import PAGE, pages_of_rows
from nc_patch.ops.triton.tiles import PER_CALL, dot_scores, load_query, program_rows, span
from nc_patch.selections.topk.gather import add_values


def tail_tiles(architecture: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> Tiles:
    """Tiles of ``tail_kernel``: rows, and pages at once."""
    return tiles_for(architecture, dtype, head_dim, value_dim, 1)


def tail_splits(
    batch: int,
    kv_heads: int,
    group: int,
    queries: int,
    keys: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    architecture: str,
) -> int:
    """How many programs share the pages of a block of rows: by their registers eight warps fit a multiprocessor."""
    tiles = tail_tiles(architecture, dtype, head_dim, value_dim)
    blocks = triton.cdiv(group * queries, tiles.rows) * batch * kv_heads
    return share(8 // tiles.warps, blocks, triton.cdiv(slot_count(keys), tiles.keys))


def launch_tail(
    query: torch.Tensor,
    means: PageMeans,
    visible: torch.Tensor,
    origin: torch.Tensor,
    budget: torch.Tensor,
    counts: torch.Tensor,
    acc: torch.Tensor,
    peak: torch.Tensor,
    total: torch.Tensor,
    *,
    key_length: int,
    first_part: int,
    scale: float,
    softcap: float,
) -> None:
    """Writes the parts of ``acc``, ``peak`` and ``total`` from ``first_part`` on; see ``split``. One launch.

    Args:
        query: ``[B, Hq, Lq, D]``. means: of pages by slot. visible: int32 ``[B, Lq, 2]``. origin: int32 ``[B, Lq]``.
        budget: int32 ``[B, Hq or 1, Lq]``.
        counts: int32 ``[B * Hq * Lq, S]``, S = ``slot_count(key_length)``: how many keys each row attends of the page
            in each slot.
        acc: float32 ``[B * Hq * Lq, parts, Dv]``. peak, total: float32 ``[B * Hq * Lq, parts]``.
    """
    B, Hq, Lq, D = query.shape
    Hkv, _S, DV = means.value.shape[1:]
    device = query.device
    architecture = architecture_of(device)
    tiles = tail_tiles(architecture, query.dtype, D, DV)
    parts = acc.shape[1]
    group = Hq // Hkv
    means = PageMeans(*(addressable(t, tiles.keys) for t in means))
    programs = triton.cdiv(Lq * group, tiles.rows) * B * Hkv
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        tail_kernel[(programs, parts - first_part)](
            *(query, *means, visible, origin, budget, counts, acc, peak, total, *query.stride()[:3]),
            *(*means.key.stride()[:3], *means.value.stride()[:3], *visible.stride()[:2], *origin.stride()),
            *(budget.stride(0), 0 if budget.shape[1] == 1 else budget.stride(1), budget.stride(2)),
            *(Hkv, group, Lq, key_length, counts.shape[1], parts, first_part, scale, softcap),
            **decode_tail_constants(D, DV, tiles, softcap > 0),
            **compile_options(tiles, architecture),
        )


def decode_tail_constants(head_dim: int, value_dim: int, tiles: Tiles, has_softcap: bool) -> dict[str, Any]:
    """The compile-time arguments of ``tail_kernel``."""
    constants = tail_constants(head_dim, value_dim, tiles, has_softcap=has_softcap)
    return {name: constants[name] for name in tail_kernel.arg_names if name in constants}


@triton.jit(do_not_specialize=[*PER_CALL, "slots", "parts", "first_part"])
def tail_kernel(
    query,
    mean_key,
    mean_value,
    visible,
    origin,
    budget,
    counts,
    acc,
    peak,
    total,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_mb,
    stride_mh,
    stride_mp,
    stride_wb,
    stride_wh,
    stride_wp,
    stride_ib,
    stride_il,
    stride_ob,
    stride_ol,
    stride_nb,
    stride_nh,
    stride_nl,
    num_kv_heads,
    group,
    Lq,
    Lk,
    slots,
    parts,
    first_part,
    scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """The partial softmax of one of the splits of the pages, for a block of rows; tiles have ``BLOCK_N`` pages.

    A row's origin says where the pages in the slots begin for it, so that rows of several sequences go together.
    """
    split = tl.program_id(1)
    splits = parts - first_part
    batch, kv_head, index, head, row, valid, start, end, _wanted = program_rows(
        visible, budget, stride_ib, stride_il, stride_nb, stride_nh, stride_nl, num_kv_heads, group, Lq, Lk, BLOCK_M
    )
    query_rows = query + batch * stride_qb + head * stride_qh + index * stride_ql
    mean_keys = mean_key + batch * stride_mb + kv_head * stride_mh
    mean_values = mean_value + batch * stride_wb + kv_head * stride_wh
    begin = tl.load(origin + batch * stride_ob + index * stride_ol, mask=valid, other=0)
    residue, own = pages_of_rows(begin, end)
    has_pages = own > start
    low, high = span(tl.cdiv(start - residue, PAGE), (own - residue) // PAGE, has_pages)
    queries = load_query(query_rows, valid, D, BLOCK_D, CHUNK_D)
    sums = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    whole = tl.zeros([BLOCK_M], dtype=tl.float32)
    p = tl.arange(0, BLOCK_N)
    dv = tl.arange(0, BLOCK_DV)
    tiles = tl.cdiv(high - low, BLOCK_N)
    for tile in range(tiles * split // splits, tiles * (split + 1) // splits):
        first = (low + tile * BLOCK_N).to(tl.int64)
        slot = low + tile * BLOCK_N + p
        here = slot < high
        page_begin = slot[None, :] * PAGE + residue[:, None]
        within = (page_begin >= start[:, None]) & (page_begin < own[:, None]) & has_pages[:, None] & here[None, :]
        attended = tl.load(counts + row[:, None] * slots + slot[None, :], mask=within, other=PAGE)
        missing = -attended + PAGE
        within = within & (missing > 0)
        raw = dot_scores(
            queries, query_rows, valid, mean_keys + first * stride_mp, p * stride_mp, here, D, BLOCK_D, CHUNK_D, True
        )
        logits = logits_base2(raw, scale, softcap, HAS_SOFTCAP)
        logits += tl.log2(tl.maximum(missing, 1).to(tl.float32))
        highest, whole, weights, shrink = fold(tl.where(within, logits, float("-inf")), highest, whole)
        values = tl.load(
            mean_values + first * stride_wp + (p[:, None] * stride_wp + dv[None, :]),
            mask=here[:, None] & (dv[None, :] < DV),
            other=0.0,
        )
        sums = add_values(sums * shrink[:, None], weights, within, values, BLOCK_M, BLOCK_DV)
    part = row * parts + first_part + split
    tl.store(acc + part[:, None] * DV + dv[None, :], sums, mask=valid[:, None] & (dv[None, :] < DV))
    tl.store(peak + part, highest, mask=valid)
    tl.store(total + part, whole, mask=valid)


def specialisations(target: str) -> Iterator[Specialisation]:
    """Every tile shape and dtype, with and without a soft-cap."""
    for dtype, head_dim, softcap in (
        (torch.bfloat16, 64, True),
        (torch.bfloat16, 80, False),
        (torch.bfloat16, 128, False),
        (torch.bfloat16, 256, True),
        (torch.float32, 128, True),
        (torch.float32, 256, False),
    ):
        tiles = tail_tiles(target, dtype, head_dim, head_dim)
        types = {
            **dict.fromkeys(("query", "mean_key", "mean_value"), pointer_to(dtype)),
            **dict.fromkeys(("visible", "origin", "budget", "counts"), "*i32"),
            **dict.fromkeys(("acc", "peak", "total"), "*fp32"),
            **dict.fromkeys(("stride_qb", "stride_mb", "stride_wb"), "i64"),
        }
        yield Specialisation(
            f"codes_tail-{DTYPE_NAMES[dtype]}-d{head_dim}{'-softcap' if softcap else ''}",
            tail_kernel,
            decode_tail_constants(head_dim, head_dim, tiles, softcap),
            types,
            compile_options(tiles, target),
            data_strides(tail_kernel, "qmw"),
        )

"""Decoding by pages over keys in blocks of memory: held to the float64 definition over each row's keys alone."""

import pytest
import torch
from attention_cases import TOLERANCE, Shape
from operations import EACH, assert_close, device_of

from nc_patch.ops.problem import AttentionResult
from nc_patch.paged import PagedKeys, PagedRows, paged_block_attention, summarize_slots_
from nc_patch.selections.block.pages import summarize
from nc_patch.vllm.blocks import bytes_per_key, paged_keys


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """``[B, H, Lq, ...]`` as ``[B * Lq, H, ...]``."""
    return tensor.transpose(1, 2).flatten(0, 1)


class Blocks:
    """The keys of a case in shuffled blocks of a backend's memory, which is NaN elsewhere; each query as a row.

    They lie as in vLLM's cache, beside another layer's, or ``together=False`` as in that of ``transformers``.
    """

    def __init__(self, shape: Shape, backend: str = "torch", keys: int = 32, together: bool = True) -> None:
        case, self.backend = shape.case(), backend
        (B, Hkv, Lk, D), Dv, page_size = case.key.shape, case.value.shape[3], case.options["size"]
        count = -(-Lk // keys)
        number = B * count + 3
        if together:
            size = keys * bytes_per_key(D, Dv, shape.dtype, page_size)
            memory = torch.full((number, 2, Hkv, size), 0xFF, dtype=torch.uint8)[:, 1]
            self.paged = paged_keys(memory.view(shape.dtype).unflatten(-1, (keys, -1)), D, Dv, page_size)
        else:
            key, value = (
                torch.full((number, keys, Hkv, width), torch.nan, dtype=shape.dtype).transpose(1, 2)
                for width in (D, Dv)
            )
            scales = torch.full((number, Hkv, keys // page_size, 3), torch.nan)
            self.paged = PagedKeys(key, value, torch.full((*scales.shape, D), -1, dtype=torch.int8), scales, page_size)
        table = torch.randperm(number)[: B * count].view(B, count).int()
        self.slots = []
        for b, end in enumerate(case.visible[..., 1].amax(1).tolist()):
            at = torch.arange(end)
            block, place = table[b, at // keys].long(), at % keys
            for memory, tensor in ((self.paged.key, case.key), (self.paged.value, case.value)):
                memory[block, :, place] = tensor[b, :, :end].transpose(0, 1)
            self.slots.append(block * keys + place)
        wide = torch.nn.functional.pad(table, (0, 2), value=-1).repeat_interleave(case.query.shape[2], 0)
        rows, device = (wide, case.visible[..., 1].flatten(), rows_of(case.budget)), device_of(backend)
        query = rows_of(case.query).mT.contiguous().mT
        self.paged = PagedKeys(*(t.to(device) for t in self.paged[:4]), page_size)
        self.rows = PagedRows(*(t.to(device) for t in rows), int(case.budget.max()))
        sinks = None if case.sinks is None else case.sinks.to(device)
        self.query, self.scoring = query.to(device), {"scale": case.scale, "softcap": case.softcap, "sinks": sinks}
        self.case = case

    def summarize(self) -> None:
        """A prompt first, beside padding, then the other keys, seven at a time."""
        for slots in self.slots:
            prompt = max(len(slots) - 35, 0)
            for some in (torch.cat((torch.tensor([-1]), slots[:prompt])), *slots[prompt:].split(7)):
                self.write(some)

    def write(self, slots: torch.Tensor) -> None:
        summarize_slots_(self.paged, slots.to(self.query.device), self.backend)

    def attend(self) -> AttentionResult:
        found = paged_block_attention(self.query, self.paged, self.rows, **self.scoring, backend=self.backend)
        return AttentionResult(*(None if t is None else t.cpu() for t in found))


def shape_of(*ends: int, **more: object) -> Shape:
    """Sequences that end there."""
    sizes = {"batch": len(ends), "keys": max(ends), "kv_heads": 2, "queries": 1, "head_dim": 32, "budget": 70}
    return Shape("paged", (), intervals=("ends", *ends), **sizes | more)


BF16, FP16 = torch.bfloat16, torch.float16


@EACH
@pytest.mark.parametrize(
    ("shape", "memory"),
    [
        (shape_of(50, 200, 333), {}),
        (shape_of(31, 190, 500, dtype=BF16, head_dim=128, value_dim=64, group=6, blocks={"size": 32}), {"keys": 64}),
        (shape_of(1, 16, 17, 250, dtype=FP16, head_dim=80, budget="per_head"), {"keys": 16}),
        (shape_of(70, 1, queries=3, head_dim=40, value_dim=24, group=3, sinks=True), {}),
        (shape_of(400, 90, head_dim=18, softcap=2.0, sinks=True, budget="per_head"), {"keys": 48}),
        (shape_of(240, queries=2, keys=300), {}),
        (shape_of(300, budget="full"), {}),
        (shape_of(90, 300, dtype=BF16, head_dim=64, value_dim=32), {"together": False}),
    ],
    ids=["ragged", "bf16-wide", "fp16-one_page", "drafts", "softcap", "beyond", "all_keys", "apart"],
)
def test_each_row_attends_what_its_sequence_alone_would(shape, memory, backend):
    # What no row may read is NaN: other blocks, keys beyond a length, statistics of pages that are not whole.
    blocks = Blocks(shape, backend, **memory)
    blocks.summarize()
    found, expected = blocks.attend(), blocks.case.reference("pages")
    assert found.output.dtype == shape.dtype
    for mine, its in zip(found.output, rows_of(expected.output), strict=True):
        assert_close(mine, its, TOLERANCE[shape.dtype])
    assert torch.equal(found.attended, rows_of(expected.attended))


@EACH
def test_pages_are_summarised_when_their_last_key_comes_and_no_other_memory_changes(backend):
    blocks = Blocks(shape_of(100, dtype=BF16), backend, keys=48)
    before, key, slots = [t.clone() for t in blocks.paged[:4]], blocks.case.key[0], blocks.slots[0]
    blocks.write(slots[[15, 16, 30, 47, 95, 99]])
    written = torch.zeros(blocks.paged.codes.shape[:3], dtype=torch.bool)
    for last in (15, 47, 95):
        block, page = int(slots[last]) // 48, int(slots[last]) % 48 // 16
        written[block, :, page] = True
        expected = summarize(key[:, last - 15 : last + 1])
        for found, its, tolerance in zip(blocks.paged[2:4], expected, (1, 0), strict=True):  # codes to rounding
            torch.testing.assert_close(found[block, :, page].cpu(), its, atol=tolerance, rtol=1e-5)
    for number, (now, old) in enumerate(zip(blocks.paged[:4], before, strict=True)):
        same = (now, old) if number < 2 else (now[~written], old[~written])
        torch.testing.assert_close(*same, rtol=0, atol=0, equal_nan=True)


def test_slots_beyond_32_bits_are_refused():
    of = lambda *shape, dtype=torch.float32: torch.zeros(1, *shape, dtype=dtype).expand(2**27, *shape)  # noqa: E731
    paged = PagedKeys(of(1, 16, 32), of(1, 16, 32), of(1, 1, 3, 32, dtype=torch.int8), of(1, 1, 3), 16)
    with pytest.raises(ValueError, match="blocks can hold at most 2147483647 keys, got 134217728 of 16"):
        summarize_slots_(paged, torch.tensor([15]))

"""Decoding by pages over keys in blocks of memory: held to the float64 definition over each row's keys alone."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from operations import INTERPRETED, assert_close, assert_summarises, reference_attention

from nc_patch.ops.problem import AttentionResult
from nc_patch.paged import PagedKeys, PagedRows, paged_block_attention, summarize_slots_
from nc_patch.vllm.blocks import bytes_per_key, paged_keys

gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that Triton supports"))
BACKENDS = ["triton"] if INTERPRETED else ["torch", "cpu", pytest.param("triton", marks=gpu)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def blocks_of_memory(engine: "Engine", blocks: int) -> PagedKeys:
    """Memory full of NaN, in blocks as vLLM's cache holds them, beside another layer's, or transformers' cache."""
    (D, Dv), keys, kv_heads, dtype = engine.dims, engine.keys, engine.kv_heads, engine.dtype
    if engine.together:
        size = keys * bytes_per_key(D, Dv, dtype, engine.page_size)
        memory = torch.full((blocks, 2, kv_heads, size), 0xFF, dtype=torch.uint8)[:, 1]
        return paged_keys(memory.view(dtype).unflatten(-1, (keys, -1)), D, Dv, engine.page_size)
    key, value = (
        torch.full((blocks, keys, kv_heads, size), torch.nan, dtype=dtype).transpose(1, 2) for size in (D, Dv)
    )
    scales = torch.full((blocks, kv_heads, keys // engine.page_size, 3), torch.nan)
    return PagedKeys(key, value, torch.full((*scales.shape, D), -1, dtype=torch.int8), scales, engine.page_size)


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


@dataclass
class Engine:
    """Sequences of random keys in shuffled blocks, and rows that decode them: ``rows`` are (sequence, length)."""

    lengths: tuple[int, ...]
    rows: tuple[tuple[int, int], ...] = ()
    dtype: torch.dtype = torch.float32
    dims: tuple[int, int] = (32, 32)
    kv_heads: int = 2
    group: int = 2
    keys: int = 32
    page_size: int = 16
    budget: int = 70
    by_head: bool = False
    softcap: float = 0.0
    sinks: bool = False
    wider: int = 2
    together: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        rows = self.rows or tuple(enumerate(self.lengths))
        counts = [-(-n // self.keys) for n in self.lengths]
        self.paged = blocks_of_memory(self, sum(counts) + 3)
        free = torch.randperm(sum(counts) + 3, generator=g)[: sum(counts)].split(counts)
        table = torch.full((len(counts), max(counts) + self.wider), -1, dtype=torch.int32)
        self.sequences = []
        for b, n in enumerate(self.lengths):
            table[b, : counts[b]] = free[b]
            key, value = (torch.randn(self.kv_heads, n, d, generator=g).to(self.dtype) for d in self.dims)
            at = torch.arange(n)
            block, place = table[b, at // self.keys].long(), at % self.keys
            for memory, rows_of in zip(self.paged, (key, value), strict=False):
                memory[block, :, place] = rows_of.transpose(0, 1)
            self.sequences.append((key, value, block * self.keys + place))
        self.of, heads = [b for b, _ in rows], self.kv_heads * self.group
        self.table, self.visible = table[self.of], torch.tensor([n for _, n in rows], dtype=torch.int32)
        self.query = torch.randn(len(rows), self.dims[0], heads, generator=g).mT.to(self.dtype)
        largest = torch.full((len(rows), heads if self.by_head else 1), self.budget, dtype=torch.int32)
        largest -= torch.randint(0, self.budget, largest.shape, generator=g, dtype=torch.int32) * self.by_head
        self.given_budget = largest.minimum(self.visible[:, None])
        self.sink_logits = torch.randn(heads, generator=g) if self.sinks else None

    @property
    def rows_of_step(self) -> PagedRows:
        return PagedRows(self.table, self.visible, self.given_budget, self.budget)

    def settings(self) -> dict[str, Any]:
        return {"scale": self.dims[0] ** -0.5, "softcap": self.softcap, "sinks": self.sink_logits}

    def summarize(self, backend: str) -> None:
        """A prompt first, beside padding, then the other keys, seven at a time."""
        for *_, slots in self.sequences:
            prompt = max(len(slots) - 35, 0)
            for some in (torch.cat((torch.tensor([-1]), slots[:prompt])), *slots[prompt:].split(7)):
                self.write(some, backend)

    def write(self, slots: torch.Tensor, backend: str) -> None:
        paged = PagedKeys(*(t.to(device_of(backend)) for t in self.paged[:4]), self.page_size)
        summarize_slots_(paged, slots.to(paged.key.device), backend)
        for mine, written in zip(self.paged[:4], paged[:4], strict=True):
            mine.copy_(written)

    def attend(self, backend: str) -> AttentionResult:
        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device_of(backend))

        paged = PagedKeys(*map(moved, self.paged[:4]), self.page_size)
        settings = self.settings() | {"sinks": moved(self.sink_logits)}
        rows = PagedRows(*map(moved, self.rows_of_step[:3]), self.budget)
        found = paged_block_attention(moved(self.query), paged, rows, backend=backend, **settings)
        return AttentionResult(*(None if t is None else t.cpu() for t in found))

    def check_rows(self, backend: str) -> None:
        found = self.attend(backend)
        assert found.attended is not None
        assert found.output.dtype == self.dtype
        for r, length in enumerate(self.visible.tolist()):
            if length == 0:
                assert not found.output[r].any()
                assert not found.attended[r].any()
                continue
            key, value, _ = self.sequences[self.of[r]]
            expected = reference_attention(
                self.query[r][None, :, None], key[None], value[None],
                visible=torch.tensor([[[0, length]]], dtype=torch.int32), budget=self.given_budget[r][None, :, None],
                selection="pages", block_size=self.page_size, **self.settings(),
            )  # fmt: skip
            assert_close(found.output[r], expected.output[0, :, 0], TOLERANCE[self.dtype])
            assert torch.equal(found.attended[r], expected.attended[0, :, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "engine",
    [
        Engine((50, 200, 333)),
        Engine((31, 190, 500), dtype=torch.bfloat16, dims=(128, 64), kv_heads=1, group=6, keys=64, page_size=32),
        Engine((1, 16, 17, 250), dtype=torch.float16, dims=(80, 80), keys=16, by_head=True),
        Engine((70, 129), ((0, 68), (0, 69), (0, 70), (1, 129), (1, 0)), dims=(40, 24), group=3, sinks=True),
        Engine((400, 90), dims=(18, 18), softcap=2.0, sinks=True, by_head=True, keys=48, seed=3),
        Engine((300,), ((0, 0), (0, 300), (0, 240)), budget=300, wider=0),
        Engine((90, 300), dtype=torch.bfloat16, dims=(64, 32), together=False),
    ],
    ids=["ragged", "bf16-wide", "fp16-one_page", "drafts", "softcap", "all_keys", "apart"],
)
def test_each_row_attends_what_its_sequence_alone_would(engine, backend):
    # What no row may read is NaN: other blocks, keys beyond a length, statistics of pages that are not whole.
    engine = replace(engine)
    engine.summarize(backend)
    engine.check_rows(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_follows_a_rows_length_is_not_read(backend):
    engine = Engine((300,), ((0, 240), (0, 230), (0, 225)), wider=0)
    engine.summarize(backend)
    *_, slots = engine.sequences[0]
    for last in slots[240::16]:
        for t in engine.paged[2:4]:
            t[last // 32, :, last % 32 // 16] = -1
    for t in engine.paged[:2]:
        t[slots[240:] // 32, :, slots[240:] % 32] = torch.nan
    engine.check_rows(backend)


def assert_same(now: torch.Tensor, before: torch.Tensor) -> None:
    torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_no_rows_and_no_slots_nothing_comes(backend):
    engine = Engine((20,))
    before = [t.clone() for t in engine.paged[:4]]
    engine.write(torch.empty(0, dtype=torch.int64), backend)
    for now, old in zip(engine.paged[:4], before, strict=True):
        assert_same(now, old)
    engine.query, engine.table, engine.visible = engine.query[:0], engine.table[:0], engine.visible[:0]
    engine.given_budget = engine.given_budget[:0]
    found = engine.attend(backend)
    assert (found.output.shape, found.attended.shape) == ((0, 4, 32), (0, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_are_summarised_when_their_last_key_comes_and_no_other_memory_changes(backend):
    engine = Engine((100,), dtype=torch.bfloat16, keys=48)
    before = [t.clone() for t in engine.paged[:4]]
    key, _, slots = engine.sequences[0]
    engine.write(slots[[15, 16, 30, 47, 95, 99]], backend)
    written = torch.zeros(engine.paged.codes.shape[:3], dtype=torch.bool)
    for last in (15, 47, 95):
        block, page = int(slots[last]) // 48, int(slots[last]) % 48 // 16
        written[block, :, page] = True
        for h in range(2):
            codes, scales = engine.paged.codes[block, h, page], engine.paged.scales[block, h, page]
            assert_summarises(codes, scales, key[h, last - 15 : last + 1])
    for number, (now, old) in enumerate(zip(engine.paged[:4], before, strict=True)):
        assert_same(*((now, old) if number < 2 else (now[~written], old[~written])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 24}, "page_size must be one of 16, 32, 64, 128, got 24"),
        ({"page_size": 64}, "a block must hold a multiple of page_size 64 keys, got 32"),
        ({"page_size": 32}, r"page_codes must be torch.int8 \[.*, 1, 3, 32\]"),
        ({"table": torch.zeros(2, 4)}, r"table must be int32 \[2, 4\] on cpu, got float32"),
        ({"lengths": torch.ones(3, dtype=torch.int32)}, r"lengths must be int32 \[2\]"),
        ({"budget": torch.ones(2, 3, dtype=torch.int32)}, r"budget must be int32 \[2, 4\] on cpu, got int32 \[2, 3\]"),
        ({"query": torch.zeros(2, 3, 32)}, "Hq a multiple of 2 key/value heads"),
        ({"query": torch.zeros(2, 4, 32).half()}, r"query must be torch.float32 \[R, Hq, 32\] on cpu"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \[4\]"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    engine = Engine((20, 30))
    of_keys, of_rows = engine.paged, engine.rows_of_step
    if "page_size" in change:
        of_keys, change = of_keys._replace(**change), {}
    elif change.keys() & set(PagedRows._fields):
        of_rows, change = of_rows._replace(**change), {}
    with pytest.raises((ValueError, RuntimeError), match=message):
        paged_block_attention(**{"query": engine.query, "paged": of_keys, "rows": of_rows, "scale": 1.0} | change)


def test_more_keys_than_32_bits_count_are_refused():
    of = lambda *shape, dtype=torch.float32: torch.zeros(1, *shape, dtype=dtype).expand(2**27, *shape)  # noqa: E731
    paged = PagedKeys(of(1, 16, 32), of(1, 16, 32), of(1, 1, 3, 32, dtype=torch.int8), of(1, 1, 3), 16)
    with pytest.raises(ValueError, match="blocks can hold at most 2147483647 keys, got 134217728 of 16"):
        summarize_slots_(paged, torch.tensor([15]))


def test_blocks_whose_steps_have_no_common_measure_are_refused_on_a_cpu():
    memory = torch.empty(2**31 + 2**12, dtype=torch.bfloat16)  # never touched
    key = memory.as_strided((2049, 1, 16, 16), (2**20 + 1, 16, 19, 1))
    paged = PagedKeys(key, key, torch.zeros(2049, 1, 1, 3, 16, dtype=torch.int8), torch.zeros(2049, 1, 1, 3), 16)
    number = torch.ones(1, dtype=torch.int32)
    rows = PagedRows(number[:, None], number, number[:, None], 1)
    with pytest.raises(ValueError, match="key has blocks of 2097154 bytes and rows of 38"):
        paged_block_attention(key[0, :1, :1], paged, rows, scale=1.0, backend="cpu")


@pytest.mark.parametrize("slots", [torch.zeros(3, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int64)])
def test_slots_that_are_no_list_of_int64_are_refused(slots):
    with pytest.raises(ValueError, match=r"slots must be int64 \[T\] on cpu, got int"):
        summarize_slots_(Engine((20,)).paged, slots)

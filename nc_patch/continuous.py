"""Continuous batching of ``transformers`` on a patched model: ``generate_batch``, and the manager behind it.

A forward pass holds parts of many requests, whose keys lie in blocks of memory. A query attends what it attends in
``generate`` of its request alone: a generated token by pages, whose statistics lie beside the cache; a prompt by the
selection for prefill, over keys that are gathered. Which of them it is follows from its position: a prompt's last token
may come alone, and generated tokens are computed again, many together, where a request had lost its memory.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AttentionInterface
from transformers.generation.continuous_batching import ContinuousBatchingManager

from nc_patch.common import UnsupportedModelError
from nc_patch.config import NCConfig
from nc_patch.families import refuse_unsupported
from nc_patch.functional import check_scale
from nc_patch.layers import PAGED_IMPLEMENTATION, PATCH_ATTRIBUTE, LayerPatch, patches_of
from nc_patch.paged import PagedKeys, PagedRows, summarize_slots_
from nc_patch.serving import Chunk, ServedLayer, chunk


def serve(model: torch.nn.Module, sparse: bool) -> None:
    """Makes continuous batching of a model sparse, or its own again, and drops the cache that a session has kept."""
    parts: list[Any] = [part for part in model.modules() if hasattr(type(part), "init_continuous_batching")]
    for part in parts:
        part.destroy_cached_continuous_batching_manager()
        part.__dict__.pop("init_continuous_batching", None)
        if sparse:
            part.init_continuous_batching = StartSession(part)


class StartSession:
    """``init_continuous_batching`` of a patched model: arguments and result as in ``transformers``.

    Raises:
        UnsupportedModelError: the tokens would not be those of ``generate``; the message says why, and the remedy.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(
        self, generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None
    ) -> ContinuousBatchingManager:
        model: Any = self._model()
        kept: ContinuousBatchingManager | None = getattr(model, "_cached_continuous_batching_manager", None)
        if kept is not None:
            return kept
        generation = model.generation_config if generation_config is None else generation_config
        given = continuous_batching_config or getattr(generation, "continuous_batching_config", None)
        settings = given or transformers.ContinuousBatchingConfig()
        _refuse_settings(model, generation, settings)
        if generation.eos_token_id is None:
            generation.eos_token_id = -1  # as transformers does: no token ends a text
        return SparseManager(model, generation, settings, workload_hints)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])


def _refuse_settings(model: Any, generation: Any, settings: Any) -> None:
    """Raises UnsupportedModelError where tokens would not be those of ``generate``, or what was asked not be done."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        raise UnsupportedModelError(
            "continuous batching of a patched model needs transformers 5.23, got "
            f"{transformers.__version__}: install a newer one, use generate, or unpatch the model"
        )
    from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

    patches = list(patches_of(model).values())
    config, decode = patches[0].config, patches[0].config.decode
    kinds = group_layers_by_attn_type(model.config.get_text_config()).keys() - {"full_attention"}
    sparse = not all(config.is_dense(patch.layer) for patch in patches)
    needs_index = sparse and decode.index_kind not in (None, "pages")
    misfit = settings.page_size % decode.page_size if decode.index_kind == "pages" else 0
    graphs = settings.use_cuda_graph
    refused = {
        f"of {', '.join(kinds)} layers, whose keys its cache drops: use generate": kinds,
        f'with decode="{decode.name}", whose index is of keys in one piece: patch with decode="block"': needs_index,
        "and measure the kept mass: patch without track and on_drop": config.track or config.on_drop != "ignore",
        "and be observed: use generate": any(patch.observe for patch in patches),
        "with cpu_offload_space, which leaves page statistics behind: set it to 0": settings.cpu_offload_space,
        f"with page_size={settings.page_size}: give a multiple of {decode.page_size}, the keys per page": misfit,
        f"with use_cuda_graph={graphs}, as it reads what a pass holds on the host: leave it out":
            graphs not in (None, False, (False, False)),
        "with a quantized cache: leave cache_implementation out": generation.cache_implementation == "quantized",
    }  # fmt: skip
    for what, applies in refused.items():
        if applies:
            raise UnsupportedModelError(f"a patched model cannot do continuous batching {what}, or unpatch the model")


class SparseManager(ContinuousBatchingManager):
    """The manager of ``transformers``; its forward passes run sparse attention, over a cache with page statistics."""

    def __init__(self, model: Any, generation: Any, settings: Any, workload_hints: Any) -> None:
        own = copy.deepcopy(settings)
        own.max_blocks_per_request, own.use_cuda_graph = 0, False
        super().__init__(model, generation, own, workload_hints)
        own, most = self.continuous_batching_config, settings.max_blocks_per_request
        if most is None:
            most = -(-getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 15) // own.page_size)
        # In passes of one token a request transformers then lists no keys, which it else grants flash attention alone.
        own.max_blocks_per_request = most
        own.max_memory_percent *= 0.95  # page statistics take 5 % of what keys and values do, or less

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Nothing: attention is switched while a pass runs, see ``_paged_attention``."""

    @contextmanager
    def _paged_attention(self) -> Iterator[None]:
        own = (module.config for module in patches_of(self.model))
        configs: list[Any] = [self.model.config, self.model.config.get_text_config(), *own]
        before = {id(config): (config, config._attn_implementation) for config in configs}
        try:
            for config, _ in before.values():
                config._attn_implementation_internal = PAGED_IMPLEMENTATION
            yield
        finally:
            for config, implementation in before.values():
                config._attn_implementation_internal = implementation

    def _create_batch_processor(self) -> Any:
        with self._paged_attention():
            processor = super()._create_batch_processor()
        if not hasattr(processor.cache, "nc_sparse"):
            patch = next(iter(patches_of(self.model).values()))
            sparse = processor.cache.nc_sparse = SparseCache(processor.cache, patch.config)
            inputs = processor.inputs_and_outputs
            inputs.prepare_batch_tensors = partial(sparse.prepare, inputs.prepare_batch_tensors)
        return processor

    def _generation_step(self) -> None:
        with self._paged_attention():
            super()._generation_step()

    def warmup(self) -> None:
        """As in ``transformers``."""
        with self._paged_attention():
            super().warmup()


class Request(NamedTuple):
    """Part of a request in a pass: its queries from number ``first`` on are those at the positions ``past:end``, which
    are the prompt's before the position ``prompt``. The keys up to ``end`` lie in ``blocks``.
    """

    first: int
    past: int
    prompt: int
    end: int
    blocks: list[int]


class Batch(NamedTuple):
    """What a pass holds. Its first T queries are no padding.

    Attributes:
        slots: int64 ``[T]``, where new keys go, as in ``summarize_slots_``. block, place: int64 ``[T]``, the same.
        rows: int64 ``[R]``, which queries choose pages, as ``decoding`` says.
        chunks: the other queries, of prompts and generated ones.
    """

    slots: torch.Tensor
    block: torch.Tensor
    place: torch.Tensor
    rows: torch.Tensor
    decoding: PagedRows
    chunks: list[Chunk]


class SparseCache:
    """Beside a paged cache: its blocks by layer, with page statistics, and the pass that runs."""

    def __init__(self, cache: Any, config: NCConfig) -> None:
        [allocator] = cache.cache_allocators.values()
        self.config = config
        self.requests: list[Request] = []
        self.page_size = config.decode.page_size if config.decode.index_kind == "pages" else 0
        self._tables = allocator.block_table
        self.block_size = N = allocator.tokens_per_page
        memory = allocator.cache_tensor
        # A block holds N keys and then N values of each layer: [blocks, layers, 2, Hkv, N, D].
        blocks = memory.view(-1, allocator.pages_per_block, 2, N, *memory.shape[-2:]).transpose(3, 4)
        of_pages = (blocks.shape[1], len(blocks), blocks.shape[3], N // self.page_size if self.page_size else 0, 3)
        self._codes = torch.zeros(*of_pages, memory.shape[-1], dtype=torch.int8, device=memory.device)
        self._scales = torch.zeros(of_pages, device=memory.device)
        layers = zip(allocator.layer_indices, blocks.unbind(1), self._codes, self._scales, strict=True)
        self.layers = {
            layer: PagedKeys(both[:, 0], both[:, 1], codes, scales, self.page_size)
            for layer, both, codes, scales in layers
        }
        allocator.copy_blocks = partial(self._copy_blocks, allocator.copy_blocks)
        cache.update = self._hand_on

    def _copy_blocks(self, copy_blocks: Any, sources: list[int], destinations: list[int]) -> None:
        copy_blocks(sources, destinations)
        for statistics in (self._codes, self._scales):
            statistics[:, destinations] = statistics[:, sources]

    def _hand_on(self, key: Any, value: Any, layer_idx: int, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """``cache.update``, which attention modules call from transformers 5.24 on: no key of the past is read."""
        kwargs["cache"] = self
        return key, value

    def prepare(self, prepare: Any, requests_in_batch: list[Any], *args: Any, **kwargs: Any) -> None:
        """``prepare_batch_tensors``, which also takes note of what the pass holds."""
        self.requests, first = [], 0
        self.__dict__.pop("batch", None)  # of the pass before
        for future in requests_in_batch:
            state, past = future.state, future.state.position_offset
            # Of a request that is computed again the initial tokens hold generated ones.
            prompt = state._true_initial_tokens or len(state.initial_tokens)
            end = past + future.query_length
            blocks = self._tables[state.request_id][: -(-end // self.block_size)]
            self.requests.append(Request(first, past, prompt, end, blocks))
            first += end - past
        prepare(requests_in_batch, *args, **kwargs)

    @cached_property
    def batch(self) -> Batch:
        """The pass that runs; its tensors are made on first use, which is on the stream that it runs on."""
        config, N = self.config, self.block_size
        width = max(len(request.blocks) for request in self.requests)
        width = 1 << (width - 1).bit_length()  # a power of two, since plans of kernels are kept by shape
        tensor = partial(torch.tensor, device=self._codes.device)
        tables = tensor([[*r.blocks, *[0] * (width - len(r.blocks))] for r in self.requests], dtype=torch.int32)
        slots, rows, seen, of_row, chunks = list[int](), list[int](), list[int](), list[int](), []
        for number, (first, past, prompt, end, blocks) in enumerate(self.requests):
            slots += [blocks[at // N] * N + at % N for at in range(past, end)]
            middle = min(max(prompt, past), end)
            parts = [(past, middle, config.prefill)]
            if self.page_size:
                rows += range(first + middle - past, first + end - past)
                seen += range(middle + 1, end + 1)
                of_row += [number] * (end - middle)
            else:
                parts.append((middle, end, config.decode))
            for low, high, selection in parts:
                if low < high:
                    queries = slice(first + low - past, first + high - past)
                    chunks.append(chunk(queries, high, tables[number], selection, high == prompt))
        at_slot, of_rows = tensor(slots), tensor(rows, dtype=torch.int64)
        lengths = tensor(seen, dtype=torch.int32)
        decoding = PagedRows(tables[tensor(of_row, dtype=torch.int64)], lengths, lengths[:, None], width * N)
        return Batch(at_slot, at_slot // N, at_slot % N, of_rows, decoding, chunks)


# torch.compile leaves the graph here, as for the attention of transformers over a paged cache.
@torch.compiler.disable
def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a pass: ``[1, H, queries, D]`` in, ``([1, queries, Hq, Dv], None)`` out, zero for padding.

    Raises:
        UnsupportedModelError: the model is not patched as it was, or somebody else calls it while the pass runs.
    """
    sparse: SparseCache | None = cache if isinstance(cache, SparseCache) else getattr(cache, "nc_sparse", None)
    patch: LayerPatch | None = module.__dict__.get(PATCH_ATTRIBUTE)
    if sparse is None or patch is None or patch.config != sparse.config:
        raise UnsupportedModelError(
            "the model is called, or was patched or unpatched, while a session of continuous batching runs: stop its "
            "manager before, or call the model within manager.pause()"
        )
    refuse_unsupported(module, kwargs, False)
    batch, paged = sparse.batch, sparse.layers[module.layer_idx]
    for memory, new in ((paged.key, key), (paged.value, value)):
        memory[batch.block, :, batch.place] = new[0, :, : len(batch.slots)].transpose(0, 1)
    scale = check_scale(scaling, softcap, query.shape[-1])
    served = ServedLayer(patch.config, patch.layer, scale, float(softcap or 0.0), s_aux)
    output = query.new_zeros(query.shape[2], query.shape[1], value.shape[-1])
    if sparse.page_size:
        summarize_slots_(paged, batch.slots, patch.config.backend)
    if len(batch.rows):
        result = served.decode(query[0].transpose(0, 1)[batch.rows], paged, batch.decoding)
        output[batch.rows] = result.output
        assert result.attended is not None
        patch.counters.add(result.attended[..., None], batch.decoding.visible)
    for part in batch.chunks:
        result, reason = served.prefill(query[:, :, part.rows], paged, part)
        output[part.rows] = result.output[0].transpose(0, 1)
        assert result.attended is not None
        patch.counters.add(result.attended, part.visible, reason)
    return output[None], None


AttentionInterface.register(PAGED_IMPLEMENTATION, paged_attention_forward)

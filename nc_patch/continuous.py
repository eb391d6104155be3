"""Continuous batching of ``transformers`` on a patched model: ``generate_batch``, and the manager behind it.

Requests run together in one forward pass, their keys in blocks of memory that a table names. A query attends what it
attends in ``generate`` of its request alone: generated tokens by pages, whose statistics lie beside the cache; prompts
by the selection for prefill, over their keys gathered. What a query is follows from its position, not from how many
queries its request has in a pass: of a prompt's last token that comes alone, and of generated tokens that are computed
again, each is what it was.
"""

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from transformers import AttentionInterface
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache

from nc_patch.attention import PATCH_ATTRIBUTE, LayerPatch
from nc_patch.common import UnsupportedModelError, once
from nc_patch.config import NCConfig
from nc_patch.families import refuse_unsupported
from nc_patch.functional import attend, check_scale
from nc_patch.hooks import PAGED_IMPLEMENTATION
from nc_patch.ops.problem import Problem, causal_intervals
from nc_patch.paged import PagedKeys, paged_block_attention, summarize_slots_
from nc_patch.selections import Dense
from nc_patch.stats import tally

# The attributes that transformers keeps a manager in between sessions, and that a paged cache keeps its SparseCache in.
_KEPT_MANAGER, _SPARSE_CACHE = "_cached_continuous_batching_manager", "_nc_sparse_cache"
_OLDEST = "5.23"
_DENSE = Dense()


def serve_sparse(model: torch.nn.Module) -> None:
    """Lets continuous batching of a patched model run sparse; what an earlier session keeps of its cache is dropped."""
    serve_plain(model)
    for part in _generating(model):
        part.init_continuous_batching = StartSession(part)


def serve_plain(model: torch.nn.Module) -> None:
    """Gives a model its own continuous batching back."""
    for part in _generating(model):
        part.__dict__.pop("init_continuous_batching", None)
        if getattr(part, _KEPT_MANAGER, None) is not None:
            part.destroy_cached_continuous_batching_manager()


def _generating(model: torch.nn.Module) -> list[Any]:
    """The model's parts that have continuous batching; wrappers that hand the call on to such a part are none."""
    return [part for part in model.modules() if hasattr(type(part), "init_continuous_batching")]


class StartSession:
    """``init_continuous_batching`` of a patched model: takes the same arguments, makes the same manager.

    Raises:
        UnsupportedModelError: the settings, or the session's, are such that its tokens would not be those of
            ``generate``; the message names what, and the remedy.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(
        self,
        generation_config: Any = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: Any = None,
    ) -> ContinuousBatchingManager:
        model: Any = self._model()
        kept: ContinuousBatchingManager | None = getattr(model, _KEPT_MANAGER, None)
        if kept is not None:
            return kept
        generation_config = model.generation_config if generation_config is None else generation_config
        given = getattr(generation_config, "continuous_batching_config", None)
        settings = continuous_batching_config or given or ContinuousBatchingConfig()
        _refuse_settings(_patches(model), model.config.get_text_config(), settings, generation_config)
        if generation_config.eos_token_id is None:
            generation_config.eos_token_id = -1  # as transformers does: generation does not end by a token
        return SparseManager(model, generation_config, settings, workload_hints)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])


def _patches(model: torch.nn.Module) -> list[LayerPatch]:
    return [module.__dict__[PATCH_ATTRIBUTE] for module in model.modules() if PATCH_ATTRIBUTE in module.__dict__]


def _refuse_settings(patches: list[LayerPatch], model_config: Any, settings: Any, generation_config: Any) -> None:
    """Raises UnsupportedModelError where a session would not give the tokens of ``generate``, or not be sparse."""
    if Version(transformers.__version__) < Version(_OLDEST):
        raise UnsupportedModelError(
            f"continuous batching of a patched model needs transformers {_OLDEST}, this is {transformers.__version__}. "
            "Install a newer one, or use generate."
        )
    from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

    config = patches[0].config
    kinds = sorted(group_layers_by_attn_type(model_config).keys() - {"full_attention"})
    decode, paged = config.decode, config.decode.index_kind == "pages"
    graphs = settings.use_cuda_graph
    for refused, what, remedy in (
        (bool(kinds), f"layers of {', '.join(kinds)}, of which the cache drops keys", "Use generate"),
        (
            decode.index_kind is not None and not paged and not all(config.is_dense(patch.layer) for patch in patches),
            f"decode={decode.name!r}, whose key index lies beside one sequence's keys",
            'Patch with decode="block", or with "window" or "dense"',
        ),
        (
            config.track or config.on_drop != "ignore",
            "track or on_drop, since the kept mass is not measured there",
            'Patch with track=False and on_drop="ignore", or use generate',
        ),
        (any(patch.observe for patch in patches), "observers", "Use generate"),
        (
            bool(settings.cpu_offload_space),
            f"cpu_offload_space={settings.cpu_offload_space}, since page statistics stay on the device",
            "Set it to 0: requests that find no room are computed again",
        ),
        (
            paged and settings.page_size % decode.page_size != 0,
            f"page_size={settings.page_size} of the cache, which pages of {decode.page_size} keys do not fill",
            f"Give ContinuousBatchingConfig a page_size that is a multiple of {decode.page_size}",
        ),
        (
            any(graphs) if isinstance(graphs, tuple) else bool(graphs),
            f"use_cuda_graph={graphs}, since what a pass holds is read on the host",
            "Leave it None",
        ),
        (
            generation_config.cache_implementation == "quantized",
            'cache_implementation="quantized"',
            "Leave it out, or use generate",
        ),
    ):
        if refused:
            raise UnsupportedModelError(
                f"continuous batching of a patched model cannot do with {what}. {remedy}, or unpatch_model for dense "
                "attention."
            )


class SparseManager(ContinuousBatchingManager):
    """The manager of ``transformers``, with sparse attention in its forward passes and page statistics by its cache."""

    def __init__(self, model: Any, generation_config: Any, settings: Any, workload_hints: Any) -> None:
        from transformers.generation.continuous_batching.initialization import (
            resolve_using_hints,
            resolve_without_hints,
        )

        # Blocks per request that a pass over one token a request may have: transformers leaves it to flash attention.
        resolved, plain = copy.deepcopy(settings), copy.deepcopy(settings)
        resolve_using_hints(resolved, workload_hints)
        resolve_without_hints(resolved)
        plain.max_blocks_per_request = 0
        super().__init__(model, generation_config, plain, workload_hints)
        self.continuous_batching_config.max_blocks_per_request = resolved.max_blocks_per_request

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Nothing: the attention is switched for as long as a forward pass runs."""

    @contextmanager
    def _paged_attention(self) -> Iterator[None]:
        """Within, the model's attention is ``paged_attention_forward``; no other one is switched."""
        configs = [self.model.config, self.model.config.get_text_config()]
        configs += [module.config for module in self.model.modules() if PATCH_ATTRIBUTE in module.__dict__]
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
        if not hasattr(processor.cache, _SPARSE_CACHE):
            sparse = SparseCache(processor.cache, _patches(self.model)[0].config)
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


class Piece(NamedTuple):
    """Consecutive queries of one request in a pass, which attend keys that are gathered for them.

    Attributes:
        first: the number of the first query in the pass. past: its position in the request. end: how many keys the last
            query sees. visible: int32 ``[1, end - past, 2]``.
        blocks: int64, those that hold the request's first ``end`` keys; None where these are all in the pass.
        decodes: whether these are generated tokens. ends: whether nothing follows that belongs to their prompt.
    """

    first: int
    past: int
    end: int
    visible: torch.Tensor
    blocks: torch.Tensor | None
    decodes: bool
    ends: bool


class Batch(NamedTuple):
    """What the requests of a pass need of its layers.

    Attributes:
        block, place: int64 ``[T]``, where the new keys go, of as many queries as there are without padding.
        slots: int64 ``[T]``, both as ``summarize_slots_`` takes them. pieces: what is gathered.
        rows: int64 ``[R]``, the queries that choose pages. visible: int32 ``[R, 1, 2]``, and table: int32 ``[R, M]``, of
            these. longest: how many keys the one sees that sees most.
    """

    block: torch.Tensor
    place: torch.Tensor
    slots: torch.Tensor
    pieces: list[Piece]
    rows: torch.Tensor
    visible: torch.Tensor
    table: torch.Tensor
    longest: int


class SparseCache:
    """What sparse attention keeps beside a paged cache: its blocks by layer, page statistics, and the pass that runs.

    Attributes:
        config: the settings that the model is patched with. layers: by index of the layer.
    """

    def __init__(self, cache: PagedAttentionCache, config: NCConfig) -> None:
        [allocator] = cache.cache_allocators.values()
        self.config, self.batch = config, None
        self._tables, self._device = allocator.block_table, allocator.cache_tensor.device
        N, Hkv, D = self._block_size, *_ = allocator.tokens_per_page, *allocator.cache_tensor.shape[-2:]
        # A block holds N keys and then N values of each layer.
        memory = allocator.cache_tensor.view(-1, allocator.pages_per_block, 2, N, Hkv, D)
        self.pages = config.decode.page_size if config.decode.index_kind == "pages" else 0
        shape = (memory.shape[1], memory.shape[0], Hkv, N // self.pages if self.pages else 0, 3)
        self._codes = torch.zeros(*shape, D, dtype=torch.int8, device=self._device)
        self._scales = torch.zeros(shape, device=self._device)
        self.layers = {
            layer: PagedKeys(*memory[:, i].transpose(2, 3).unbind(1), self._codes[i], self._scales[i])
            for i, layer in enumerate(allocator.layer_indices)
        }
        allocator.copy_blocks = partial(self._copy_blocks, allocator.copy_blocks)
        cache.update = self._hand_on  # type: ignore[method-assign]
        setattr(cache, _SPARSE_CACHE, self)

    def _copy_blocks(self, copy_blocks: Any, sources: list[int], destinations: list[int]) -> None:
        copy_blocks(sources, destinations)
        for statistics in (self._codes, self._scales):
            statistics[:, destinations] = statistics[:, sources]

    def _hand_on(self, key: Any, value: Any, layer_idx: int, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """``update`` of the cache, which attention modules call from transformers 5.24 on: no key is gathered here."""
        kwargs["cache"] = self
        return key, value

    def prepare(self, prepare: Any, requests_in_batch: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        """``prepare_batch_tensors``, which knows of each request in the pass where it is."""
        N, first = self._block_size, 0
        slots: list[int] = []
        rows: list[int] = []
        lengths: list[int] = []
        tables: list[list[int]] = []
        pieces: list[Piece] = []
        for future in requests_in_batch:
            state, past = future.state, future.state.position_offset
            end = past + future.query_length
            # Of a request that is computed again, generated tokens are among the initial ones.
            prompt = state._true_initial_tokens or len(state.initial_tokens)
            generated = min(max(prompt, past), end)
            blocks = self._tables[state.request_id][: -(-end // N)]
            slots += [blocks[position // N] * N + position % N for position in range(past, end)]
            if generated > past:
                pieces.append(self._piece(first, past, generated, blocks, False, generated == prompt))
            if self.pages:
                rows += range(first + generated - past, first + end - past)
                lengths += range(generated + 1, end + 1)
                tables += [blocks] * (end - generated)
            elif end > generated:
                pieces.append(self._piece(first + generated - past, generated, end, blocks, True, True))
            first += end - past
        most = max(map(len, tables), default=0)
        table = [blocks + [0] * (most - len(blocks)) for blocks in tables]
        at, which = (torch.tensor(numbers, dtype=torch.int64, device=self._device) for numbers in (slots, rows))
        named = torch.tensor(table, dtype=torch.int32, device=self._device)
        visible = torch.tensor([[[0, n]] for n in lengths], dtype=torch.int32, device=self._device)
        self.batch = Batch(at // N, at % N, at, pieces, which, visible, named, max(lengths, default=0))
        prepare(requests_in_batch, *args, **kwargs)

    def _piece(self, first: int, past: int, end: int, blocks: list[int], decodes: bool, ends: bool) -> Piece:
        held = torch.tensor(blocks[: -(-end // self._block_size)], device=self._device) if past else None
        return Piece(first, past, end, causal_intervals(1, end - past, end, self._device), held, decodes, ends)


# Compiled passes leave the graph here, as for attention of transformers over a paged cache.
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
    """Attention of a pass of continuous batching: ``[1, H, T, D]`` in, ``([1, T, Hq, Dv], None)`` out; padding gives 0.

    Raises:
        UnsupportedModelError: the model is called by something else while the pass runs, or is not patched as it was.
    """
    sparse: SparseCache | None = cache if isinstance(cache, SparseCache) else getattr(cache, _SPARSE_CACHE, None)
    if sparse is None:
        raise UnsupportedModelError(
            "the model was called while its continuous batching runs: call it within `with manager.pause():`."
        )
    patch: LayerPatch | None = module.__dict__.get(PATCH_ATTRIBUTE)
    if patch is None or patch.config != sparse.config:
        raise UnsupportedModelError(
            "the model was unpatched, or patched anew, while its continuous batching runs: stop the manager before."
        )
    refuse_unsupported(module, kwargs, False)
    assert sparse.batch is not None
    batch, paged = sparse.batch, sparse.layers[module.layer_idx]  # type: ignore[index]
    T = len(batch.slots)
    for memory, new in ((paged.key, key), (paged.value, value)):
        memory[batch.block, :, batch.place] = new[0, :, :T].transpose(0, 1)
    unseen = query.new_empty(1, 1, 0, dtype=torch.int32)
    problem = Problem(
        *(query, key, value, unseen, unseen, unseen),
        scale=check_scale(scaling, softcap, query.shape[-1]),
        softcap=0.0 if softcap is None else float(softcap),
        sinks=s_aux,
    )
    output = query.new_zeros(query.shape[2], query.shape[1], value.shape[-1])
    if sparse.pages:
        summarize_slots_(paged, batch.slots, sparse.pages, patch.config.backend)
        if len(batch.rows):
            output[batch.rows] = _attend_pages(patch, problem, paged, batch, sparse.pages)
    for piece in batch.pieces:
        output[piece.first : piece.first + piece.end - piece.past] = _attend_piece(patch, problem, paged, piece)
    return output[None], None


def _attend_pages(patch: LayerPatch, problem: Problem, paged: PagedKeys, batch: Batch, page_size: int) -> torch.Tensor:
    """``[R, Hq, Dv]``: what the rows of a pass attend by page statistics; in a layer that is dense, every key."""
    config, layer, visible, most = patch.config, patch.layer, batch.visible, batch.longest
    lengths = visible[:, 0, 1].contiguous()
    budget = lengths[:, None]
    if not config.is_dense(layer):
        find = lambda: config.row_budgets(visible, batch.longest, layer)[..., 0].contiguous()  # noqa: E731
        budget = once(visible, ("budget", config.laws(layer)), find)
        most = config.largest_budget(batch.longest, layer)
    query = problem.query[0].transpose(0, 1)[batch.rows]
    scores = {"scale": problem.scale, "softcap": problem.softcap, "sinks": problem.sinks}
    result = paged_block_attention(
        *(query, paged, batch.table, lengths, budget),
        most=most, page_size=page_size, backend=config.backend, **scores,
    )  # fmt: skip
    assert result.attended is not None
    patch.counters.add_later(result.attended[..., None], visible)
    return result.output


def _attend_piece(patch: LayerPatch, problem: Problem, paged: PagedKeys, piece: Piece) -> torch.Tensor:
    """``[queries, Hq, Dv]``: what a piece attends; queries that choose together and are cut apart attend every key."""
    config, count = patch.config, piece.end - piece.past
    selection = config.decode if piece.decodes else config.prefill
    reason = None
    if isinstance(selection, Dense) or config.is_dense(patch.layer):
        reason = "the settings say so"
    elif piece.end <= config.dense_below:
        reason = f"no query sees more than dense_below={config.dense_below} keys"
    together = getattr(selection, "query_block_size", 1) if selection.chooses_together and reason is None else 1
    begin = min(-piece.past % together, count)
    stop = count if piece.ends else max(begin, count - piece.end % together)
    cut = "other queries that they choose keys with are in another pass"
    queries = slice(piece.first, piece.first + count)
    key, value = problem.key[:, :, queries], problem.value[:, :, queries]
    if piece.blocks is not None:
        # [1, Hkv, end, D]
        gather = lambda t: t.transpose(1, 2)[piece.blocks].flatten(0, 1)[: piece.end].transpose(0, 1)[None]  # noqa: E731
        key, value = gather(paged.key), gather(paged.value)
    outputs = []
    for low, high, why in ((0, begin, cut), (begin, stop, reason), (stop, count, cut)):
        if low == high:
            continue
        seen = once(piece.visible, (low, high), lambda low=low, high=high: piece.visible[:, low:high].contiguous())
        law = ("budget", config.laws(patch.layer))
        part = problem._replace(
            query=problem.query[:, :, queries][:, :, low:high], key=key, value=value, visible=seen,
            origin=once(seen, ("origin",), lambda seen=seen: torch.zeros_like(seen[..., 0])),
            budget=once(seen, law, lambda seen=seen: config.row_budgets(seen, piece.end, patch.layer)),
        )  # fmt: skip
        if why is not None:
            part = part.over_all_keys()
        result = attend(part, selection if why is None else _DENSE, config.backend)
        attended = part.budget if result.attended is None else result.attended
        patch.counters.add(tally(attended, seen, patch.counters.tail), why)
        outputs.append(result.output[0].transpose(0, 1))
    return torch.cat(outputs)


AttentionInterface.register(PAGED_IMPLEMENTATION, paged_attention_forward)

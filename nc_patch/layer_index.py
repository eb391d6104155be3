"""The key index of one layer while it decodes: kept in its cache and brought up to date, or built for the call."""

import torch

from nc_patch.cache import LayerCache
from nc_patch.config import NCConfig
from nc_patch.ops.backends import choose_backend
from nc_patch.ops.derivatives import in_transform
from nc_patch.selections.index import KIND_OF, IndexKind, KeyIndex


def key_index_of(
    config: NCConfig,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    cache: LayerCache | None,
    decoding: bool,
) -> KeyIndex | None:
    """The index of a layer's keys, brought up to date, or None where it does not decode by one."""
    kind = KIND_OF.get(config.decode)
    if kind is None or not visible.numel():
        return None
    backend, _ = choose_backend(config.backend, kind, key.device, head_dims=(key.shape[-1], value.shape[-1]))
    use = config.key_index == "always" or not config.refine or (config.key_index == "auto" and _pays(kind, backend))
    kept = _kept_index(config, kind, key, value, visible, origin, cache) if use else None
    if decoding and in_transform() and (kind == "pages" or not config.refine):
        raise NotImplementedError(
            "decoding by an index does not run inside a transform of torch.func (grad, vmap). Decode outside of it, or "
            'without an index: decode="topk" with refine=True, or "window"'
        )
    if kept is None and decoding and (kind == "pages" or not config.refine):
        # The same choice as with an index that is kept, from one that is not.
        start, end = origin[:, -1].clamp(min=0), visible[..., 1].amax(-1)
        return KeyIndex.build(key, kind, start=start, end=end, block_size=config.block_size, backend=config.backend)
    return kept


def key_means_of(
    config: NCConfig,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    cache: LayerCache | None,
) -> KeyIndex | None:
    """The means of a layer's pages, brought up to date, where decoding approximates what it leaves out by them."""
    if config.tail != "mean" or config.decode != "topk" or config.key_index == "never" or not visible.numel():
        return None
    return _kept_index(config, "means", key, value, visible, origin, cache)


def _kept_index(
    config: NCConfig,
    kind: IndexKind,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    origin: torch.Tensor,
    cache: LayerCache | None,
) -> KeyIndex | None:
    """The index of a kind that a cache layer keeps, brought up to date; None where the cache can keep none."""
    layer = None if cache is None else cache.layer
    if layer is None or in_transform() or not layer.nc_keeps(kind):
        return None
    if torch.compiler.is_compiling() and layer.nc_unstarted(kind):
        return None  # what would have to be built waits for a call outside the graph
    return layer.nc_update(key, value, visible, origin, kind, config.block_size, config.backend)


def _pays(kind: str, backend: str) -> bool:
    """Whether keeping an index saves time: reading a byte an element does only where reading is what takes the time."""
    return kind == "pages" or backend == "triton"

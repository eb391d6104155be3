"""Turns the masks of ``transformers`` into visible intervals; nothing downstream knows any other mask.

A visible interval is the half-open range [start, end) of key positions that a query may see. With it goes the origin,
the key position at which the query's sequence begins: blocks are aligned to it. Both are counted in the key buffer, so
an origin may be negative where a sliding cache has dropped the first keys.

Between the mask function and the attention function ``transformers`` carries one tensor, ``int32[B, 1, Lq, 3]`` (start,
end, origin): four dimensions, because ``generate`` hands masks in twice and a 4-D mask is passed through as it is.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import masking_utils

from nc_patch.errors import UnsupportedMaskError

MaskFunction = Callable[..., Any]

_REMEDY = (
    "Sparse attention needs each query to see one run of keys. Remove the custom mask, or leave the layers that need "
    "it dense with dense_layers=..."
)


class Visibility(NamedTuple):
    """Which keys each query may see.

    Attributes:
        visible: int32 ``[B, Lq, 2]``, start and end of each query's interval; equal where a query sees nothing.
        origin: int32 ``[B, Lq]``, the key position at which the query's sequence begins.
    """

    visible: torch.Tensor
    origin: torch.Tensor

    def pack(self) -> torch.Tensor:
        """The one tensor that ``transformers`` carries, ``int32[B, 1, Lq, 3]``."""
        return torch.cat((self.visible, self.origin[..., None]), dim=-1)[:, None].contiguous()

    @classmethod
    def unpack(cls, mask: torch.Tensor) -> "Visibility":
        """The inverse of ``pack``."""
        return cls(mask[:, 0, :, :2], mask[:, 0, :, 2])


def is_packed(mask: Any) -> bool:
    """Whether a mask is one that ``Visibility.pack`` made."""
    return (
        isinstance(mask, torch.Tensor)
        and mask.dtype == torch.int32
        and mask.ndim == 4
        and mask.shape[1] == 1
        and mask.shape[3] in (3, 4)
    )


def is_bidirectional(mask: Any) -> bool:
    """Whether a mask was packed for attention that is not causal, such as cross-attention: it has a fourth column."""
    return is_packed(mask) and mask.shape[3] == 4


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    local_size: int | None = None,
    **_: Any,
) -> torch.Tensor:
    """The mask function that ``transformers`` calls: packed visible intervals instead of a mask.

    Args:
        batch_size, q_length, kv_length: B, Lq and Lk.
        q_offset, kv_offset: positions of the first query and the first key within the whole context.
        mask_function: what ``transformers`` composed: causal, sliding, chunked and packed masks are understood, and the
            plain bidirectional one of cross-attention, in which every query sees all keys.
        attention_mask: the 2-D padding mask ``[B, positions]``, true for tokens; or the result of an earlier call.
        device: where the result goes.
        use_vmap: set by ``transformers`` where a model adds a mask function of its own.
        local_size: set by ``transformers`` where the mask slides or goes by chunks.

    Returns:
        int32 ``[B, 1, Lq, 3]``, see ``Visibility.pack``.

    Raises:
        UnsupportedMaskError: the mask is not one interval per query.
    """
    if is_packed(attention_mask):
        return attention_mask  # type: ignore[return-value]
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UnsupportedMaskError(
            f"expected a 2-D padding mask [batch, positions], got shape {tuple(attention_mask.shape)}. {_REMEDY}"
        )
    if mask_function is masking_utils.bidirectional_mask_function:
        return _all_keys(batch_size, q_length, kv_length, attention_mask, device)
    position = torch.arange(q_length, device=device)[None] + q_offset
    if torch.compiler.is_compiling():
        start, origin = _probe(
            mask_function, position, batch_size, kv_length + kv_offset, custom=use_vmap, slides=local_size is not None
        )
    else:
        start, origin = _derive(mask_function, position)
    start, end, origin = (t.expand(batch_size, q_length) for t in (start, position + 1, origin))
    if attention_mask is not None:
        start, end, origin = _apply_padding(attention_mask.to(device), position, start, end, origin)
    start, end = ((t - kv_offset).clamp(0, kv_length) for t in (start, end))
    visible = torch.stack((torch.minimum(start, end), end), dim=-1)
    packed = Visibility(visible.to(torch.int32), (origin - kv_offset).to(torch.int32)).pack()
    if not torch.compiler.is_compiling():
        packed._nc_key_length = kv_length  # type: ignore[attr-defined]
    return packed


def made_for(mask: torch.Tensor) -> int | None:
    """How many keys the packed intervals were made for, or None where that is not known."""
    length: int | None = getattr(mask, "_nc_key_length", None)
    return length


def is_plain_causal(mask: torch.Tensor, key_length: int) -> bool:
    """Whether packed intervals are plain causal attention, the last query aligned with the last key.

    Reads the tensor once and remembers the answer on it, so that the layers of a model share one synchronisation.
    """
    remembered: bool | None = getattr(mask, "_nc_plain_causal", None)
    if remembered is None:
        length = mask.shape[2]
        end = torch.arange(key_length - length + 1, key_length + 1, device=mask.device, dtype=torch.int32)
        remembered = bool((mask[..., 0].eq(0) & mask[..., 1].eq(end)).all())
        mask._nc_plain_causal = remembered  # type: ignore[attr-defined]
    return remembered


def _all_keys(
    batch_size: int, q_length: int, kv_length: int, padding: torch.Tensor | None, device: torch.device | str
) -> torch.Tensor:
    """Packed intervals of all keys that a 2-D padding mask leaves, with the column that marks them as not causal."""
    visible = torch.tensor([0, kv_length], dtype=torch.int32, device=device).expand(batch_size, 1, 2)
    if padding is not None:
        first, stop = _token_run(padding.to(device).bool())
        visible = torch.cat((torch.minimum(first, stop), stop), -1)[:, None].to(torch.int32)
    visible = visible.expand(batch_size, q_length, 2)
    return torch.nn.functional.pad(visible, (0, 2))[:, None].contiguous()


_HOLES = (
    "the padding mask has holes: the tokens of a row must be one run, padded on the left or right. "
    "Move the padding to one side of each row; to generate, to the left (tokenizer.padding_side = 'left')."
)


def _token_run(padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First token of each row and the end of its tokens, int64 ``[B, 1]``; raises where they are not one run."""
    index = torch.arange(padding.shape[-1], device=padding.device)
    first = torch.where(padding, index, padding.shape[-1]).amin(-1, keepdim=True)
    stop = torch.where(padding, index + 1, 0).amax(-1, keepdim=True)
    whole = padding.sum(-1, keepdim=True) == (stop - first).clamp(min=0)
    # Decoding too: generating after padding on the right leaves a hole. A capture must not read the device.
    capturing = padding.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling():
        torch._assert_async(whole.all(), _HOLES)
    elif not capturing and not bool(whole.all()):
        raise UnsupportedMaskError(_HOLES)
    return first, stop


def _apply_padding(
    padding: torch.Tensor, position: torch.Tensor, start: torch.Tensor, end: torch.Tensor, origin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cuts the intervals to the tokens of a 2-D padding mask; a padding query sees nothing."""
    padding = padding.bool()
    length = padding.shape[-1]
    first, stop = _token_run(padding)
    is_token = torch.gather(
        torch.nn.functional.pad(padding, (0, 1)), -1, position.clamp(max=length).expand(padding.shape[0], -1)
    )
    start, end = torch.maximum(start, first), torch.minimum(end, stop)
    return start, torch.where(is_token, end, start), torch.maximum(origin, first)


# What is recognised: the code of each mask function that masking_utils composes, taken from one made for the purpose.
_NOTHING = torch.zeros(1, 1, dtype=torch.long)
_CODES = {
    masking_utils.causal_mask_function.__code__: "causal",
    masking_utils.and_masks(masking_utils.causal_mask_function).__code__: "and",
    masking_utils.sliding_window_overlay(1).__code__: "sliding",
    masking_utils.chunked_overlay(1, _NOTHING).__code__: "chunked",
    masking_utils.packed_sequence_mask_function(_NOTHING).__code__: "packed",
}
if hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # absent before transformers 5.18
    _CODES[masking_utils.remap_positions_for_packed_sequence(len, _NOTHING).__code__] = "remap"


def _parts(mask_function: MaskFunction, positions: torch.Tensor | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The elementary mask functions whose intersection ``mask_function`` is, each with what it closes over."""
    kind = _CODES.get(getattr(mask_function, "__code__", None))
    if kind is None:
        name = getattr(mask_function, "__qualname__", repr(mask_function))
        raise UnsupportedMaskError(f"the mask {name} is not one interval of keys per query. {_REMEDY}")
    names = mask_function.__code__.co_freevars
    closed = dict(zip(names, (cell.cell_contents for cell in mask_function.__closure__ or ()), strict=True))
    if kind == "and":
        for part in closed["mask_functions"]:
            yield from _parts(part, positions)
    elif kind == "remap":
        yield from _parts(closed["mask_function"], closed["position_ids"])
    else:
        yield kind, closed | {"positions": positions}


def _derive(mask_function: MaskFunction, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First visible position and origin ``[B or 1, Lq]`` of the queries at ``position[1, Lq]``, from a mask's parts."""
    parts = list(_parts(mask_function))
    if not any(kind == "causal" for kind, _ in parts):
        raise UnsupportedMaskError(f"the mask {mask_function.__qualname__} is not causal. {_REMEDY}")
    start, origin = torch.zeros_like(position), torch.zeros_like(position)
    for kind, closed in parts:
        if kind == "sliding":
            start = torch.maximum(start, position + 1 - closed["sliding_window"])
        elif kind == "chunked":
            # Chunks are counted from the first token, in positions of the sequence where sequences are packed.
            within = position if closed["positions"] is None else closed["positions"].to(position.device)
            within = within - closed["left_padding"].to(position.device)[:, None]
            start = torch.maximum(start, position - within.remainder(closed["chunk_size"]))
        elif kind == "packed":
            sequence = closed["packed_sequence_mask"].to(position.device)
            begins = torch.ones_like(sequence, dtype=torch.bool)
            begins[:, 1:] = sequence[:, 1:] != sequence[:, :-1]
            index = torch.arange(sequence.shape[-1], device=sequence.device)
            origin = torch.where(begins, index, 0).cummax(-1).values
            start = torch.maximum(start, origin)
    return start, origin


# By how many steps the bisection below finds one of 2**steps keys. A few numbers for all lengths: a graph is compiled
# for each, and may be of any length otherwise. What is exported is one graph, with the most.
_SEARCH_STEPS = (31, 22, 17, 12)


def _probe(
    mask_function: MaskFunction, position: torch.Tensor, batch_size: int, length: int, *, custom: bool, slides: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """First visible position and origin by bisection on the mask function itself.

    While ``torch.compile`` traces, closures cannot be looked into, but the function can be called: below its own
    position a query's visibility is monotone in the key's position, so that O(Lq log Lk) evaluations find the start.
    """
    name = mask_function.__name__
    if custom or name not in ("causal_mask_function", "and_mask"):
        raise UnsupportedMaskError(f"the mask {name} is not one interval of keys per query. {_REMEDY}")
    position = position.expand(batch_size, -1)
    if name == "causal_mask_function":
        return torch.zeros_like(position), torch.zeros_like(position)
    batch = torch.arange(batch_size, device=position.device)[:, None]
    head = torch.zeros_like(batch)
    low, high = torch.zeros_like(position), position.clone()
    steps, *fewer = _SEARCH_STEPS
    for enough in () if torch.compiler.is_exporting() else fewer:
        if length <= 1 << enough:
            steps = enough
    for _ in range(steps):
        middle = (low + high) // 2
        seen = mask_function(batch, head, position, middle)
        low, high = torch.where(seen, low, middle + 1), torch.where(seen, middle, high)
    start = torch.minimum(low, position)
    # Packed sequences begin where their intervals do; where intervals slide, the row is taken as one sequence.
    return start, torch.zeros_like(start) if slides else start

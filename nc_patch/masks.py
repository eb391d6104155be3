"""Turns the masks of ``transformers`` into visible intervals, as it makes them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import masking_utils

from nc_patch.common import UnsupportedMaskError, share
from nc_patch.ops.derivatives import is_capturing, refuse_transforms
from nc_patch.visibility import Visibility, is_packed, keys_first, runs_of

MaskFunction = Callable[..., Any]
# The first visible position and the origin of each query, int64 ``[B or 1, Lq]``.
Starts = tuple[torch.Tensor, ...]

# Elements of a mask that are looked at together, to bound memory.
_ELEMENTS_AT_ONCE = 1 << 24


def interval_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | torch.Tensor = 0, kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function, attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu", **options: Any,
) -> torch.Tensor:  # fmt: skip
    """The mask function that ``transformers`` calls: packed visible intervals instead of a mask.

    Args:
        q_offset, kv_offset: positions of the first query and the first key within the whole context.
        attention_mask: the 2-D padding mask ``[B, positions]``, true for tokens; or the result of an earlier call.
        options: of ``transformers``: ``use_vmap`` where a model adds a function of its own, and ``local_size``.

    Returns:
        uint32 ``[B, 1, R, 3]``, see ``Visibility.pack``; or where some query sees more than one run of keys the bool
        mask ``[B, 1, Lq, Lk]``, which layers that are left dense can take.

    Raises:
        UnsupportedMaskError: the padding mask is not 2-D; or ``torch.compile`` traces what is not one interval a query.
    """
    refuse_transforms()  # before a mask that is mapped over is read
    if is_packed(attention_mask):
        return attention_mask  # type: ignore[return-value]
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UnsupportedMaskError(
            f"expected a 2-D padding mask [batch, positions], got shape {tuple(attention_mask.shape)}. Pass what the "
            "tokenizer returns, or leave layers that need another mask dense with dense_layers=..."
        )
    padding = None if attention_mask is None else attention_mask.to(device).bool()
    position = torch.arange(q_length, device=device)[None] + q_offset

    def seen(first: int, last: int) -> torch.Tensor:
        """The rows ``first:last`` as ``transformers`` would make them, bool ``[B, 1, last - first, Lk]``."""
        return masking_utils.sdpa_mask(
            *(batch_size, last - first, kv_length, q_offset + first, kv_offset, mask_function, padding),
            allow_is_causal_skip=False, use_vmap=options.get("use_vmap", False), device=device,
        )  # fmt: skip

    def seen_by_tokens() -> Iterator[torch.Tensor]:
        """The rows, some at a time, bool ``[B, some, Lk]``; those of padding queries see nothing."""
        is_token = None if padding is None else _is_token(padding, position)
        step = max(1, _ELEMENTS_AT_ONCE // max(1, batch_size * kv_length))
        for first in range(0, q_length, step):
            rows = seen(first, min(first + step, q_length))[:, 0].expand(batch_size, -1, -1)
            yield rows if is_token is None else rows & is_token[:, first : first + step, None]

    if mask_function is masking_utils.bidirectional_mask_function:
        packed = _all_keys(batch_size, q_length, kv_length, padding, device)
        return seen(0, q_length) if packed is None else packed
    compiling = torch.compiler.is_compiling()
    every = position.expand(batch_size, -1)
    found = _probe(mask_function, every, options) if compiling else _derive(mask_function, position)
    visibility: Visibility | None
    begins = None
    if found is None:
        visibility = runs_of(seen_by_tokens(), kv_length)
    else:
        found = tuple(t.expand(batch_size, q_length) for t in found)
        visibility, begins = _within_keys(found, position, padding, kv_offset, kv_length)
    if visibility is None:
        mask = seen(0, q_length)
        mask._nc_function = getattr(mask_function, "__qualname__", repr(mask_function))  # type: ignore[attr-defined]
        return mask
    packed = share(visibility.pack())
    if not compiling:
        packed._nc_key_length, packed._nc_begins = kv_length, begins  # type: ignore[attr-defined]
    return packed


def _within_keys(
    found: Starts, position: torch.Tensor, padding: torch.Tensor | None, kv_offset: int, kv_length: int
) -> tuple[Visibility, tuple[int, ...] | None]:
    """Intervals from their start to the query's own position, int64 ``[B, Lq]``, as they lie among a call's keys; and
    where the padding lets rows begin and end, see ``visibility.begins_by``.
    """
    start, origin = found
    begins: tuple[int, ...] | None = ()
    end, order = (position + 1).expand_as(start), None
    offset: int | torch.Tensor = kv_offset
    if padding is not None:
        # Cut to the tokens; a padding query sees nothing.
        first, stop, whole, begins = _token_run(padding, position[:, -1:] + 1)
        start, end, origin = torch.maximum(start, first), torch.minimum(end, stop), torch.maximum(origin, first)
        end = torch.where(_is_token(padding, position), end, start)
        if not whole:
            if position.shape[1] == 1:
                _refuse_right_padding(padding)
            # Counted in tokens instead of positions.
            before = pad(padding.cumsum(-1), (1, 0))
            start, end, origin = (before.gather(1, at.clamp(0, padding.shape[1])) for at in (start, end, origin))
            offset = before[:, min(kv_offset, padding.shape[1])][:, None]
            order = keys_first(pad(padding, (0, kv_offset + kv_length - padding.shape[1]))[:, kv_offset:])
    start, end = ((t - offset).clamp(0, kv_length) for t in (start, end))
    visible = torch.stack((torch.minimum(start, end), end), dim=-1)
    return Visibility(visible.to(torch.int32), (origin - offset).to(torch.int32), order), begins


def _all_keys(
    batch_size: int, q_length: int, kv_length: int, padding: torch.Tensor | None, device: torch.device | str
) -> torch.Tensor | None:
    """Packed intervals of all keys but padding, with the column that says not causal; None where padding has holes."""
    visible = torch.tensor([0, kv_length], dtype=torch.int32, device=device).expand(batch_size, 1, 2)
    if padding is not None:
        first, stop, whole, _ = _token_run(padding, 0)
        if not whole:
            return None
        visible = torch.cat((torch.minimum(first, stop), stop), -1)[:, None].to(torch.int32)
    return pad(visible.expand(batch_size, q_length, 2), (0, 2))[:, None].contiguous().view(torch.uint32)


_HOLES = (
    "the padding mask has holes, which a compiled call cannot take: the tokens of a row must be one run. Move the "
    "padding to one side of each row; to generate, to the left (tokenizer.padding_side = 'left'). Or run the model "
    "without torch.compile."
)


def _token_run(
    padding: torch.Tensor, end: torch.Tensor | int
) -> tuple[torch.Tensor, torch.Tensor, bool, tuple[int, ...] | None]:
    """First token of each row and the end of its last one, int64 ``[B, 1]``; whether nothing lies between them; and as
    numbers the first ones, and how far the last ones are from the ``end`` of the queries: see ``begins_by``.

    Neither a compiled graph nor a capture can read that: they take it to be so, and a graph stops where it is not.
    """
    index = torch.arange(padding.shape[-1], device=padding.device)
    first = torch.where(padding, index, padding.shape[-1]).amin(-1, keepdim=True)
    stop = torch.where(padding, index + 1, 0).amax(-1, keepdim=True)
    whole = (padding.sum(-1, keepdim=True) == (stop - first).clamp(min=0)).all()
    if torch.compiler.is_compiling() or is_capturing(padding):
        torch._assert_async(whole, _HOLES)
        return first, stop, True, None
    is_whole, *begins = torch.cat((whole[None], first.flatten(), (end - stop).clamp(min=0).flatten())).tolist()
    known = padding.shape[-1] not in begins
    return first, stop, bool(is_whole), (tuple(begins) if any(begins) else ()) if known else None


def _refuse_right_padding(padding: torch.Tensor) -> None:
    """Refuses a step of decoding whose token stands right behind padding that follows tokens."""
    if bool((padding[:, -1] & ~padding[:, -2:-1].any(-1) & padding[:, :-2].any(-1)).any()):
        raise UnsupportedMaskError(
            "the padding mask has holes, and the one token of this call stands right behind one. After a prompt padded "
            "on the right the padding's output would have been taken for it: pad on the left; to generate, to the left "
            "(tokenizer.padding_side = 'left'). Where the hole is meant, pass the call's tokens with one before them."
        )


def _is_token(padding: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Which of the queries at ``position[1, Lq]`` are tokens, bool ``[B, Lq]``; those beyond the padding mask are."""
    length = padding.shape[-1]
    return torch.gather(pad(padding, (0, 1), value=True), -1, position.clamp(max=length).expand(padding.shape[0], -1))


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
    """The elementary functions, or ``"other"``, whose intersection a mask function is, and what each closes over."""
    kind = _CODES.get(getattr(mask_function, "__code__", None), "other")
    if kind == "other":
        yield kind, {}
        return
    names = mask_function.__code__.co_freevars
    closed = dict(zip(names, (cell.cell_contents for cell in mask_function.__closure__ or ()), strict=True))
    if kind == "and":
        for part in closed["mask_functions"]:
            yield from _parts(part, positions)
    elif kind == "remap":
        yield from _parts(closed["mask_function"], closed["position_ids"])
    else:
        yield kind, closed | {"positions": positions}


def _derive(mask_function: MaskFunction, position: torch.Tensor) -> Starts | None:
    """The starts of the queries at ``position[1, Lq]``, from a mask's parts; None unless all are known, one causal."""
    parts = list(_parts(mask_function))
    kinds = {kind for kind, _ in parts}
    if "causal" not in kinds or "other" in kinds:
        return None
    start = origin = torch.zeros_like(position)
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
            begins = pad(sequence[:, 1:] != sequence[:, :-1], (1, 0), value=True)
            index = torch.arange(sequence.shape[-1], device=sequence.device)
            origin = torch.where(begins, index, 0).cummax(-1).values
            start = torch.maximum(start, origin)
    return start, origin


def _probe(mask_function: MaskFunction, position: torch.Tensor, options: dict[str, Any]) -> Starts:
    """The starts of the queries at ``position[B, Lq]``, by bisection on the mask function.

    While ``torch.compile`` traces, closures cannot be looked into, but the function can be called: below its own
    position a query's visibility is monotone in the key's position, so that 31 evaluations find the start.
    """
    name = mask_function.__name__
    if options.get("use_vmap") or name not in ("causal_mask_function", "and_mask"):
        raise UnsupportedMaskError(
            f"the mask {name} cannot be looked at while torch.compile traces, where only causal, sliding, chunked and "
            "packed masks can. Make this call without torch.compile."
        )
    low = torch.zeros_like(position)
    if name == "causal_mask_function":
        return low, low
    batch = torch.arange(len(position), device=position.device)[:, None]
    head, high = torch.zeros_like(batch), position
    for _ in range(31):  # enough for every length, of which a graph may be
        middle = (low + high) // 2
        seen = mask_function(batch, head, position, middle)
        low, high = torch.where(seen, low, middle + 1), torch.where(seen, middle, high)
    start = torch.minimum(low, position)
    # Packed sequences begin where their intervals do; where intervals slide, the row is taken as one sequence.
    return start, start if options.get("local_size") is None else torch.zeros_like(start)

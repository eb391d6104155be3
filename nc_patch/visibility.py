"""Which keys each query may see, as one interval a query; no kernel knows another mask.

Where a mask leaves holes, as padding in the middle of a row does, the keys that some query sees are taken first, in
their order: among those every query sees one run again.

Between the mask function and the attention function ``transformers`` carries one tensor, ``uint32[B, 1, R, 3]`` (start,
end, origin of each query; then the order, if any): 4-D, since ``generate`` hands masks in twice and passes such ones
through as they are; and of a dtype that no other mask has.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from nc_patch.common import UnsupportedMaskError
from nc_patch.ops.problem import causal_intervals


class Visibility(NamedTuple):
    """Which keys each query may see: ``visible`` and ``origin`` as in ``Problem``, and ``order``, int32 ``[B, Lk]``, in
    which keys are to be taken before intervals and origins count; None where they count in the keys as they lie.
    """

    visible: torch.Tensor
    origin: torch.Tensor
    order: torch.Tensor | None = None

    def pack(self) -> torch.Tensor:
        """The one tensor that ``transformers`` carries, uint32 ``[B, 1, Lq, 3]``, longer where there is an order."""
        rows = torch.cat((self.visible, self.origin[..., None]), dim=-1)
        if self.order is not None:
            rows = torch.cat((rows, pad(self.order, (0, -self.order.shape[1] % 3)).unflatten(1, (-1, 3))), 1)
        return rows[:, None].contiguous().view(torch.uint32)

    @classmethod
    def unpack(cls, mask: torch.Tensor, query_length: int, key_length: int) -> "Visibility":
        """The inverse of ``pack`` for Lq queries and Lk keys; raises UnsupportedMaskError if made for another call."""
        rows = mask.view(torch.int32)[:, 0]
        if rows.shape[1] not in (query_length, query_length + -(-key_length // 3)):
            raise UnsupportedMaskError(
                f"the mask was made for another call than one of {query_length} queries and {key_length} keys: pass "
                "the 2-D padding mask [batch, positions]"
            )
        order = None if rows.shape[1] == query_length else rows[:, query_length:, :3].flatten(1)[:, :key_length]
        # Contiguous, as kernels take them: once for all layers of a forward pass.
        return cls(rows[:, :query_length, :2].contiguous(), rows[:, :query_length, 2].contiguous(), order)

    def expand(self, batch: int) -> "Visibility":
        """The same for every sequence of a batch, where it was given for one."""
        if len(self.visible) == batch:
            return self
        expand = lambda t: t.expand(batch, *t.shape[1:]).contiguous()  # noqa: E731
        order = None if self.order is None else expand(self.order)
        return Visibility(expand(self.visible), expand(self.origin), order)

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keys or values ``[B, H, Lk, D]`` in the order in which intervals count."""
        return tensor if self.order is None else tensor.take_along_dim(self.order.long()[:, None, :, None], 2)


def is_packed(mask: Any) -> bool:
    """Whether a mask is one that ``Visibility.pack`` made."""
    four = isinstance(mask, torch.Tensor) and mask.dtype == torch.uint32 and mask.ndim == 4
    return four and mask.shape[1] == 1 and mask.shape[3] in (3, 4)


def is_bidirectional(mask: Any) -> bool:
    """Whether a mask was packed for attention that is not causal, such as cross-attention: it has a fourth column."""
    return is_packed(mask) and mask.shape[3] == 4


def made_for(mask: torch.Tensor) -> int | None:
    """How many keys the packed intervals were made for, or None where that is not known."""
    return getattr(mask, "_nc_key_length", None)


def begins_by(mask: torch.Tensor) -> tuple[int, ...] | None:
    """Where the tokens of each row begin by the padding that packed intervals were made with, and how many positions of
    padding are behind them: empty where all are 0; None where that is not known, or a row has no token yet.
    """
    return getattr(mask, "_nc_begins", None)


def is_plain_causal(visible: torch.Tensor, key_length: int) -> bool:
    """Whether intervals are ``causal_intervals``; reads the device."""
    batch, query_length = visible.shape[:2]
    return torch.equal(visible, causal_intervals(batch, query_length, key_length, visible.device))


def runs_of(rows: Iterable[torch.Tensor], key_length: int) -> Visibility | None:
    """What a mask, bool ``[B, some queries, Lk]`` a part, lets queries see; None where a query sees several runs of the
    keys that any query of its row sees. A query whose interval begins where those before have ended begins a sequence.
    """
    parts, union = [], None
    for part in rows:
        first, stop = part.byte().argmax(-1), key_length - part.flip(-1).byte().argmax(-1)
        parts.append(torch.stack((first, stop, part.sum(-1)), -1))
        union = part.any(1) if union is None else union | part.any(1)
    if union is None or not key_length:
        return None
    first, stop, count = torch.cat(parts, 1).unbind(-1)
    first, stop = first.masked_fill(count == 0, 0), stop.masked_fill(count == 0, 0)
    start, end = (pad(union.cumsum(-1), (1, 0)).gather(1, at) for at in (first, stop))
    one_run, in_place = torch.stack(((end - start == count).all(), (stop - first == count).all())).tolist()
    if not one_run:
        return None
    if in_place:
        start, end = first, stop
    begins = (count > 0) & (start >= pad(end.cummax(1).values, (1, -1)))
    origin = torch.where(begins, start, 0).cummax(1).values
    origin = torch.where(count > 0, torch.minimum(origin, start), origin)
    visible = torch.stack((start, end), -1).to(torch.int32)
    return Visibility(visible, origin.to(torch.int32), None if in_place else keys_first(union))


def keys_first(kept: torch.Tensor) -> torch.Tensor:
    """The order, int32 ``[B, Lk]``, in which the keys that are ``kept``, bool, come before the others."""
    return kept.logical_not().byte().argsort(dim=-1, stable=True).to(torch.int32)


# What a mask that is added to scores hides a key by, at least: no weight is left of it.
HIDES = -1e4


def seen_keys(mask: torch.Tensor) -> torch.Tensor:
    """Which keys a mask that is bool or added to the scores lets queries see, bool of the same shape."""
    return mask > HIDES if mask.is_floating_point() else mask.bool()


def visibility_of(mask: torch.Tensor, batch: int, query_length: int, key_length: int, owner: str) -> Visibility:
    """What a mask lets queries see: a packed one, or ``[B or 1, heads or 1, Lq, Lk]``, bool or added to the scores.

    Raises:
        UnsupportedMaskError: sparse attention cannot take it; the message names its ``owner``.
    """
    if is_packed(mask):
        return Visibility.unpack(mask, query_length, key_length).expand(batch)
    if torch.compiler.is_compiling():
        why = "it cannot be looked at while torch.compile traces"
    elif mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[2:] != (query_length, key_length):
        why = f"it should be [{batch}, 1, {query_length}, {key_length}]"
    elif mask.dtype != torch.bool and not mask.is_floating_point():
        why = "it should be bool, or of a float dtype and added to the scores"
    elif mask.is_floating_point() and not bool(((mask <= HIDES) | (mask == 0)).all()):
        why = f"it adds to scores, where keys can only be hidden, by {HIDES:g} or less, or left as they are, by 0"
    elif mask.requires_grad:
        why = "it requires a gradient, and has none"
    elif mask.shape[1] != 1 and not bool((seen_keys(mask) == seen_keys(mask[:, :1])).all()):
        why = "it differs from head to head"
    else:
        found = runs_of([seen_keys(mask)[:, 0]], key_length)
        if found is not None:
            return found.expand(batch)
        why = "a query sees several runs of keys, and other queries see what lies between them"
    made_by = getattr(mask, "_nc_function", None)
    shape = f"{mask.dtype} {tuple(mask.shape)}" + (f", made by {made_by}" if made_by else "")
    raise UnsupportedMaskError(
        f"{owner} got a custom attention mask ({shape}) that sparse attention cannot take: {why}. Pass a 2-D padding "
        "mask [batch, positions], or leave the layer dense with dense_layers=..."
    )


# What transformers hands on of where packed sequences begin; see split_sequences.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "position_ids")


def own_keys(visible: torch.Tensor) -> torch.Tensor:
    """The key at each query's own position, int64 ``[B, Lq]``: queries that see a key lie at the last that any sees."""
    is_token = visible[..., 1] > visible[..., 0]
    later = is_token.sum(1, keepdim=True) - is_token.cumsum(1)
    return visible[..., 1].amax(1, keepdim=True) - 1 - later


def split_sequences(visibility: Visibility, **boundaries: torch.Tensor | None) -> Visibility:
    """Cuts intervals to their own sequence where several are packed into a row and the caller says where they begin.

    ``boundaries`` are ``BOUNDARIES``, of which the first that is given counts: ``cu_seq_lens_q`` and ``_k``, int
    ``[sequences + 1]``; ``seq_idx``, int ``[B or 1, Lq]``, the number of each token's sequence; ``position_ids``, int
    ``[B or 1, Lq]``, which begin again with 0 or with less than the token's before. The last of the Lq queries is at
    the last key that any of them sees.

    Returns the same object where that changes nothing; while ``torch.compile`` traces always a new one.

    Raises:
        UnsupportedMaskError: the boundaries do not fit the call.
    """
    B, Lq = visibility.visible.shape[:2]
    numbers, restart = _numbered(B, Lq, boundaries) if Lq > 1 else (None, False)
    if numbers is None:
        return visibility
    start, end = visibility.visible.unbind(-1)
    is_token, row = end > start, torch.arange(Lq, device=end.device)
    # Padding between tokens says nothing: each token is compared with the one before it.
    before = pad(torch.where(is_token, row, -1).cummax(1).values, (1, -1), value=-1)
    numbers = numbers.expand(B, Lq)
    previous = numbers.gather(1, before.clamp(min=0))
    opens = ((numbers == 0) | (numbers < previous)) if restart else numbers != previous
    opens &= is_token & (before >= 0)
    begin = torch.where(opens, own_keys(visibility.visible), torch.iinfo(torch.int32).min).cummax(1).values
    begin = begin.to(torch.int32)
    cut = is_token & ((start < begin) | (visibility.origin < begin))
    if not torch.compiler.is_compiling() and not bool(cut.any()):
        return visibility
    start = torch.minimum(torch.maximum(start, begin), end)
    return Visibility(torch.stack((start, end), -1), torch.maximum(visibility.origin, begin), visibility.order)


def _numbered(
    batch: int, query_length: int, boundaries: dict[str, torch.Tensor | None]
) -> tuple[torch.Tensor | None, bool]:
    """A number of each query, int ``[B or 1, Lq]``, and whether it restarts where a sequence begins or only changes."""
    *lengths, seq_idx, position_ids = (boundaries.get(name) for name in BOUNDARIES)
    ends = [each for each in lengths if each is not None]
    if ends:
        if not torch.compiler.is_compiling():
            said = [e.tolist() if isinstance(e, torch.Tensor) else e for e in ends]
            one, first = isinstance(ends[0], torch.Tensor) and ends[0].ndim == 1 and batch == 1, said[0]
            if not one or first != [0, *sorted(first)[1:-1], query_length] or first != said[-1]:
                raise UnsupportedMaskError(
                    f"cu_seq_lens_q must name the sequences of one row of {query_length} tokens, from 0 to "
                    f"{query_length}, and cu_seq_lens_k the same ones, got {batch} rows and {said}"
                )
        row = torch.arange(query_length, device=ends[0].device)
        return torch.searchsorted(ends[0].long(), row, right=True)[None], False
    if seq_idx is not None and seq_idx.ndim == 2 and seq_idx.shape[1] == query_length:
        return seq_idx, False
    # Other shapes are no positions in a text: those of images have three axes.
    if position_ids is not None and position_ids.ndim == 2 and position_ids.shape[1] == query_length:
        return position_ids, True
    return None, False

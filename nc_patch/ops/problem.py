"""One call of attention as it travels to the kernels: its tensors and settings, their check, and what comes back.

Shapes: B batch, Hq query heads, Hkv key/value heads, G = Hq / Hkv, Lq queries, Lk keys, D and Dv head dimensions.
"""

from typing import Any, NamedTuple

import torch

from nc_patch.ops.means import PageMeans

# Dtypes of queries, keys and values.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Most queries of a call that counts as decoding: several at once verify what another model has proposed, 20 by default.
MAX_DECODE_QUERIES = 32
# The largest head_dim of keys and of values for which the Triton kernels have tiles.
MAX_HEAD_DIM = 256


class Problem(NamedTuple):
    """What attention is computed of.

    Attributes:
        query: ``[B, Hq, Lq, D]``, bfloat16, float16 or float32. key: ``[B, Hkv, Lk, D]``. value: ``[B, Hkv, Lk, Dv]``.
        visible: int32 ``[B, Lq, 2]``, contiguous: the half-open interval [start, end) of keys that each query sees.
        origin: int32 ``[B, Lq]``, contiguous: the key position at which each query's sequence begins; negative where a
            cache has dropped its first keys.
        budget: int32 ``[B, Hq or 1, Lq]``, contiguous: how many keys each query attends, at most as many as it sees.
        scale: factor of the scores. softcap: scores become ``softcap * tanh(score / softcap)``; 0 for none.
        sinks: ``[Hq]``, learned logits that join the softmax's denominator, or None.
        means: page means of ``key`` and ``value`` that are kept beside them, or None.
        key_index: the tensors of the index that decoding chooses by; none for prefill. page_size: keys per page of it.
        table: int32 ``[B, M]``, the blocks of memory in which each sequence's keys lie, where they are paged. Then
            ``key`` is ``[blocks, Hkv, N, D]``, ``value`` and ``key_index`` are alike, ``visible`` is int32 ``[B, 1]``,
            how many keys the only query of each sequence sees, and ``origin`` is not read.
        new: how many keys before the end of each sequence ``key_index`` and ``means`` take in first, in place.
        most: no budget is larger; buffers of decoding are sized by it.
        stats: whether the log-sum-exp and the kept mass are wanted. bounds: whether bounds of the kept mass are.
        audit_seed: of the rows whose kept mass is estimated; negative for none.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor
    origin: torch.Tensor
    budget: torch.Tensor
    scale: float
    softcap: float = 0.0
    sinks: torch.Tensor | None = None
    means: PageMeans | None = None
    key_index: tuple[torch.Tensor, ...] = ()
    page_size: int = 0
    new: int = 0
    most: int = 0
    stats: bool = False
    bounds: bool = False
    audit_seed: int = -1
    table: torch.Tensor | None = None

    @property
    def group(self) -> int:
        """G, the query heads of a key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def head_dims(self) -> tuple[int, int]:
        """D and Dv."""
        return self.query.shape[-1], self.value.shape[-1]

    @property
    def key_length(self) -> int:
        """Lk, or the keys for which the table has blocks."""
        return self.key.shape[2] * (1 if self.table is None else self.table.shape[1])

    @property
    def phase(self) -> str:
        """``"decode"`` where there is an index to choose by, else ``"prefill"``."""
        return "decode" if len(self.key_index) > 0 else "prefill"

    def over_all_keys(self) -> "Problem":
        """The problem with budgets of all that each query sees, and without page means."""
        start, end = self.visible.unbind(-1)
        seen = (end.clamp(max=self.key.shape[2]) - start.clamp(min=0)).clamp(min=0)
        return self._replace(budget=seen[:, None].contiguous(), means=None)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is there, in the order of ``unflatten``."""
        return [*self[:6], *(() if self.sinks is None else (self.sinks,)), *self.kept()]

    def kept(self) -> list[torch.Tensor]:
        """The tensors that are kept beside keys and values: ``means`` and ``key_index``."""
        return [*(self.means or ()), *self.key_index]

    def flags(self) -> list[int]:
        """What ``unflatten`` has to know beside the tensors and the two numbers of the scores."""
        there = (self.sinks is not None, self.means is not None, self.stats, self.bounds)
        return [*map(int, there), self.page_size, self.new, self.audit_seed]

    @classmethod
    def unflatten(cls, tensors: list[torch.Tensor], numbers: list[float], flags: list[int], most: int = 0) -> "Problem":
        """The inverse of ``tensors`` and ``flags``; ``numbers`` are the scale and the soft-cap."""
        has_sinks, has_means, stats, bounds, page_size, new, audit_seed = flags
        rest = tensors[6:]
        sinks = rest.pop(0) if has_sinks else None
        means = PageMeans(rest.pop(0), rest.pop(0)) if has_means else None
        given = (*numbers, sinks, means, tuple(rest), page_size, new, most, bool(stats), bool(bounds), audit_seed)
        return cls(*tensors[:6], *given)  # type: ignore[arg-type]


# Columns of an audit: how many rows there are, an estimate of the sum of their kept mass with its variance and degrees
# of freedom, and how many were audited.
AUDIT_COLUMNS = ("rows", "kept_mass", "variance", "freedom", "audited")


class AttentionResult(NamedTuple):
    """What attention returns: the output, and on request what it attended.

    Attributes:
        output: ``[B, Hq, Lq, Dv]``; zero for a query that sees no key.
        lse: float ``[B, Hq, Lq]``, the natural log of the softmax denominator (attended keys, page means, and the sink
            logit where there is one); ``-inf`` for a query that sees no key and has no sink.
        kept_mass: float ``[B, Hq, Lq]``, the sum of the attended keys' weights in the dense softmax over the keys
            alone; 1 for a query that sees no key.
        attended: int32 ``[B, Hq, Lq]``, the number of keys attended.
        kept_mass_bounds: float ``[B, Hq, Lq, 2]``, two numbers between which the kept mass lies for certain.
        audit: float32 ``[Hq + 1, 5]``, an unbiased estimate of what such a choice keeps, in ``AUDIT_COLUMNS``; a line
            for each head, and one of all together, whose estimates come from the same rows, and err together.
    """

    output: torch.Tensor
    lse: torch.Tensor | None = None
    kept_mass: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    kept_mass_bounds: torch.Tensor | None = None
    audit: torch.Tensor | None = None


def causal_intervals(batch: int, query_length: int, key_length: int, device: torch.device | str) -> torch.Tensor:
    """Intervals ``int32[B, Lq, 2]`` of plain causal attention, the last query aligned with the last key."""
    end = torch.arange(key_length - query_length + 1, key_length + 1, dtype=torch.int32, device=device).clamp(min=0)
    return torch.stack((torch.zeros_like(end), end), dim=-1).expand(batch, -1, -1).contiguous()


def visible_mask(visible: torch.Tensor, key_length: int) -> torch.Tensor:
    """The intervals ``int32[B, Lq, 2]`` as a bool mask ``[B, 1, Lq, Lk]``."""
    position = torch.arange(key_length, device=visible.device)
    start, end = visible[:, None, :, :1], visible[:, None, :, 1:]
    return (position >= start) & (position < end)


def check_tensor(name: str, tensor: Any) -> None:
    """Raises TypeError or ValueError unless a tensor has the dimensions and the dtype of queries, keys or values."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor [batch, heads, length, head_dim], got {type(tensor).__name__}")
    if tensor.ndim != 4:
        raise ValueError(f"{name} must be [batch, heads, length, head_dim], got shape {tuple(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{name} must be one of {allowed}, got {tensor.dtype}; convert it, or the model, by .to()")


def check_tensors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[int, int, int, int]:
    """B, Hq, Lq and Lk; raises ValueError or TypeError unless the tensors fit together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}: move them to one device")
    B, Hq, Lq, D = query.shape
    Hkv, Lk = key.shape[1], key.shape[2]
    if key.shape != (B, Hkv, Lk, D) or value.shape[:3] != (B, Hkv, Lk):
        raise ValueError(
            "key must be [B, Hkv, Lk, D] and value [B, Hkv, Lk, Dv] with query's B and D, got "
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    if D == 0 or value.shape[3] == 0:
        raise ValueError(f"head_dim must be at least 1, got query {tuple(query.shape)}, value {tuple(value.shape)}")
    if Hkv == 0 or Hq == 0 or Hq % Hkv:
        raise ValueError(f"the number of query heads must be a multiple of the key/value heads, got {Hq} and {Hkv}")
    if sinks is None or (isinstance(sinks, torch.Tensor) and sinks.shape == (Hq,) and sinks.device == query.device):
        return B, Hq, Lq, Lk
    raise ValueError(f"sinks must be [{Hq}] on {query.device}, got {describe(sinks)}")


def check_int32(name: str, tensor: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises ValueError unless a tensor is int32, of this shape and on this device."""
    fits = isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int32 and tuple(tensor.shape) == shape
    if not fits or tensor.device != device:
        raise ValueError(f"{name} must be int32 {list(shape)} on {device}, got {describe(tensor)}")


def check_intervals(visible: torch.Tensor, key_length: int) -> None:
    """Raises ValueError unless intervals int32 ``[B, Lq, 2]`` lie within the keys; reads the tensor."""
    if visible.numel():
        low, high = int(visible.min()), int(visible.max())
        if low < 0 or high > key_length:
            raise ValueError(f"visible must lie within the keys, 0 to {key_length}, got {low} to {high}")
        if bool((visible[..., 1] < visible[..., 0]).any()):
            raise ValueError(
                "visible has an interval that ends before it starts; make start and end equal where it is empty"
            )


def describe(tensor: Any) -> str:
    """A tensor's dtype, shape and device for a message, or the type of what is no tensor."""
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"

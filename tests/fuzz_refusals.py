"""Calls with one thing wrong with them, which must be refused by an exception that says what."""

import random
from collections.abc import Callable
from typing import Any

import torch

from nc_patch import KeyIndex, sparse_attention

Arguments = dict[str, Any]


def _tensors(rng: random.Random) -> Arguments:
    B, Hkv, group, D = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 40)
    Lk = rng.randint(1, 60)
    Lq = rng.randint(1, Lk)
    shapes = {"query": (B, Hkv * group, Lq, D), "key": (B, Hkv, Lk, D), "value": (B, Hkv, Lk, D)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {"alpha": 2.0, "C": 0.5}


def _number(rng: random.Random) -> Any:
    return rng.choice((float("nan"), float("inf"), -float("inf"), -1.0, 10**400, "2", None, True, [], {}, 1j, b"1"))


def _option(*names: str) -> Callable[[random.Random, Arguments], None]:
    def change(rng: random.Random, arguments: Arguments) -> None:
        arguments[rng.choice(names)] = _number(rng)

    return change


def _interval(rng: random.Random, arguments: Arguments) -> None:
    (B, _, Lq, _), Lk = arguments["query"].shape, arguments["key"].shape[2]
    visible = torch.tensor([0, Lk], dtype=torch.int32).repeat(B, Lq, 1)
    row = (rng.randrange(B), rng.randrange(Lq))
    kind = rng.randrange(6)
    if kind == 0:
        visible[row][1] = rng.choice((Lk + 1, 2**31 - 1))
    elif kind == 1:
        visible[row][0] = rng.choice((-1, -(2**31)))
    elif kind == 2:
        visible[row] = torch.tensor([Lk, 0])
    elif kind == 3:
        visible = visible.to(rng.choice((torch.int64, torch.float32, torch.bool)))
    elif kind == 4:
        visible = visible[:, :, : rng.choice((0, 1))]
    else:
        visible = visible[None]
    arguments["visible"] = visible


def _shape(rng: random.Random, arguments: Arguments) -> None:
    name = rng.choice(("query", "key", "value"))
    tensor = arguments[name]
    kind = rng.randrange(7)
    if kind == 0:
        tensor = tensor[0]
    elif kind == 1:
        tensor = tensor.to(rng.choice((torch.float64, torch.int32, torch.complex64, torch.bool)))
    elif kind == 2:
        tensor = tensor[:, :0]
    elif kind == 3:
        arguments["query"], arguments["key"] = arguments["query"][..., :0], arguments["key"][..., :0]
        return
    elif kind == 4:
        tensor = torch.cat((tensor, tensor))
    elif kind == 5:
        tensor = tensor.to("meta")
    else:
        tensor = rng.choice((None, tensor.tolist(), tensor.numpy()))
    arguments[name] = tensor


def _more_queries_than_keys(rng: random.Random, arguments: Arguments) -> None:
    arguments["query"] = torch.cat((arguments["query"],) * 61, 2)


def _origin(rng: random.Random, arguments: Arguments) -> None:
    B, _, Lq, _ = arguments["query"].shape
    arguments["origin"] = rng.choice(
        (torch.zeros(B, Lq), torch.zeros(B, Lq + 1, dtype=torch.int32), torch.zeros(B, dtype=torch.int32), 0, [0] * Lq)
    )


def _index(rng: random.Random, arguments: Arguments) -> None:
    key, value = arguments["key"], arguments["value"]
    kind = rng.randrange(4)
    if kind == 0:
        arguments["index"] = KeyIndex.build(key, "pages")
    elif kind == 1:
        arguments["index"] = KeyIndex.build(torch.cat((key, key), 1), "codes")
    elif kind == 2:
        arguments["index"] = KeyIndex.build(key[:, :, :-1], "codes")
    else:
        arguments |= {"means": KeyIndex.build(key, "means", value=value), "tail": "drop"}


def _sinks(rng: random.Random, arguments: Arguments) -> None:
    heads = arguments["query"].shape[1]
    arguments["sinks"] = rng.choice((torch.zeros(heads + 1), torch.zeros(1, heads), torch.zeros(heads).tolist(), 1.0))


CHANGES: list[Callable[[random.Random, Arguments], None]] = [
    _option("alpha", "C"),
    _option("block_size", "query_block_size", "sample_stride", "local_keys", "max_factor"),
    _option("selection", "backend", "tail", "law", "return_kept_mass"),
    _option("scale", "softcap"),
    _option("sink_keys", "recent_keys", "min_keys", "dense_below"),
    _option("no_such_option"),
    _interval,
    _interval,
    _shape,
    _shape,
    _more_queries_than_keys,
    _origin,
    _index,
    _sinks,
]
# What stands for "the default" is nothing wrong.
_FINE = ({"scale": None}, {"softcap": None}, {"return_kept_mass": None}, {"alpha": True}, {"sample_stride": None})


def check_refused(seed: int) -> str | None:
    """Runs one call with something wrong; what is wrong with how it ended, or None."""
    rng = random.Random(f"refused {seed}")
    arguments = _tensors(rng)
    rng.choice(CHANGES)(rng, arguments)
    if any(name in arguments and arguments[name] is value for fine in _FINE for name, value in fine.items()):
        return None
    said = ", ".join(f"{name}={_of(value)}" for name, value in arguments.items())
    try:
        sparse_attention(**arguments)
    except (ValueError, TypeError) as error:
        message = str(error)
        return None if len(message) > 15 else f"refused {seed}: the message {message!r} says nothing; {said}"
    except Exception as error:  # any other kind is what is looked for
        return f"refused {seed}: {type(error).__name__}: {error}; {said}"
    return f"refused {seed}: nothing was refused; {said}"


def _of(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:60]

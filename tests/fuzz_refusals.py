"""Calls with one thing wrong with them, which must be refused by an exception that says what."""

import random
from typing import Any

import torch

from nc_patch import KeyIndex, sparse_attention

OPTIONS = (
    *("alpha", "C", "scale", "softcap", "sink_keys", "recent_keys", "min_keys", "dense_below", "block_size"),
    *("query_block_size", "sample_stride", "local_keys", "max_factor", "selection", "backend", "tail", "law"),
    *("return_kept_mass", "no_such_option"),
)
NO_VALUES = (float("nan"), float("inf"), -float("inf"), -1.0, 10**400, "2", None, True, [], {}, 1j, b"1")
# What stands for "the default" is nothing wrong.
_FINE = {("scale", None), ("softcap", None), ("return_kept_mass", None), ("alpha", True), ("sample_stride", None)}


def check_refused(seed: int) -> str | None:
    """Runs one call with something wrong; what is wrong with how it ended, or None."""
    rng = random.Random(f"refused {seed}")
    arguments, wrong = _wrong_call(rng)
    while (wrong, repr(arguments.get(wrong))) in {(name, repr(value)) for name, value in _FINE}:
        arguments, wrong = _wrong_call(rng)
    said = f"refused {seed}: {wrong}={arguments[wrong]!r:.300}"
    try:
        sparse_attention(**arguments)
    except (ValueError, TypeError) as error:
        return None if len(str(error)) > 15 else f"{said}: the message {error} says nothing"
    except Exception as error:  # any other kind is what is looked for
        return f"{said}: {type(error).__name__}: {error}"
    return f"{said}: nothing was refused"


def _wrong_call(rng: random.Random) -> tuple[dict[str, Any], str]:
    """Arguments, and the name of the one that is wrong."""
    B, Hkv, Lk, D = (rng.randint(1, most) for most in (3, 3, 60, 40))
    Lq, Hq = rng.randint(1, Lk), Hkv * rng.randint(1, 4)
    key, value = torch.randn(B, Hkv, Lk, D), torch.randn(B, Hkv, Lk, D)
    arguments: dict[str, Any] = {"query": torch.randn(B, Hq, Lq, D), "key": key, "value": value, "alpha": 2.0, "C": 0.5}
    wrong = rng.choice((*OPTIONS, *("visible", "query", "key", "value", "origin", "index", "means", "sinks") * 2))
    visible = torch.tensor([0, Lk], dtype=torch.int32).repeat(B, Lq, 1)
    row = (rng.randrange(B), rng.randrange(Lq))
    if wrong in OPTIONS:
        given = rng.choice(NO_VALUES)
    elif wrong in ("query", "key", "value"):
        tensor = arguments[wrong]
        dtype = rng.choice((torch.float64, torch.int32, torch.complex64, torch.bool))
        choices = [tensor[0], tensor.to(dtype), tensor[:, :0], torch.cat((tensor, tensor)), tensor.to("meta")]
        given = rng.choice([*choices, None, tensor.tolist(), tensor.numpy(), tensor[..., :0]])
        if wrong == "query" and rng.random() < 0.2:
            given = torch.cat((tensor,) * 61, 2)  # more queries than keys
    elif wrong == "visible":
        interval = rng.choice(([0, Lk + 1], [0, 2**31 - 1], [-1, Lk], [-(2**31), Lk], [Lk, 0]))
        outside = visible.index_put(tuple(map(torch.tensor, row)), torch.tensor(interval, dtype=torch.int32))
        dtype = rng.choice((torch.int64, torch.float32, torch.bool))
        given = rng.choice((outside, outside, outside, visible.to(dtype), visible[:, :, :1], visible[None]))
    elif wrong == "origin":
        few = torch.zeros(B, dtype=torch.int32)
        given = rng.choice((torch.zeros(B, Lq), torch.zeros(B, Lq + 1, dtype=torch.int32), few, 0, [0] * Lq))
    elif wrong == "sinks":
        given = rng.choice((torch.zeros(Hq + 1), torch.zeros(1, Hq), [0.0] * Hq, 1.0))
    elif wrong == "index":
        others = (torch.cat((key, key), 1), key[:, :, :-1])
        given = rng.choice((KeyIndex.build(key, "pages"), *(KeyIndex.build(other, "codes") for other in others)))
    else:
        given, arguments["tail"] = KeyIndex.build(key, "means", value=value), "drop"
    return arguments | {wrong: given}, wrong

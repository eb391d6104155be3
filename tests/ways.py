"""The ways of running a model, and the settings that each is held to: one list of both.

However a model is run, a full budget gives dense attention's numbers, and a small one the numbers of each row alone.
"""

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, random_ids, tiny_model
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, StaticCache

from nc_patch import is_patched, nc_stats, patch_model, stats

# Every key, by way of the selection; and few enough keys that the output is far from dense.
FULL, SMALL = (1e6, 0.0), (2.0, 0.5)
# The paper's definition: the same choice in prefill and decoding, however a sequence is cut into calls.
TOPK = {"selection": "topk"}
# What patch_model does unasked, with query blocks and local keys of which a tiny model's prompt holds several.
UNASKED = {"query_block_size": 32, "local_keys": 0}
BLOCKS = {"selection": "block", "block_size": 16}
# Rows that see no more keys attend them all in some settings, and calls of such rows alone run dense: the sequences of
# all tests cross this border.
BORDER = {"dense_below": 13}
SETTINGS: dict[str, dict[str, Any]] = {
    "topk": TOPK,
    "topk by codes": TOPK | BORDER | {"key_index": "always", "tail": "drop"},
    "window": {"selection": "window"} | BORDER,
    "blocks": BLOCKS,
    "unasked": UNASKED | BORDER,
}
# Where each query chooses for itself, alike in prefill and decoding, a sequence may be cut anywhere.
CUT_ANYWHERE = ("topk", "topk by codes", "window")
# The families that a plain run goes through; the others run in the wide sweep.
CORE = ("llama", "gemma2")


def wide_but(plain: Iterable[str], every: Iterable[str]) -> list[Any]:
    """Names to run over, of which those that are not ``plain`` are left to the wide sweep."""
    return [pytest.param(name, marks=() if name in plain else pytest.mark.wide, id=name) for name in every]


EACH_FAMILY = wide_but(CORE, FAMILIES)
EACH_SETTING = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def families_and_settings(*plain: tuple[str, str], names: Iterable[str] = SETTINGS) -> pytest.MarkDecorator:
    """All families with settings of these names; those that are not ``plain`` are left to the wide sweep."""
    marks = {case: () if case in plain else pytest.mark.wide for case in itertools.product(FAMILIES, names)}
    cases = [pytest.param(case[0], SETTINGS[case[1]], marks=mark, id="-".join(case)) for case, mark in marks.items()]
    return pytest.mark.parametrize(("family", "settings"), cases)


# A plain run goes through every setting of the first family, and two of the second.
EACH_FAMILY_AND_SETTING = families_and_settings(
    *((CORE[0], name) for name in SETTINGS), (CORE[1], "topk"), (CORE[1], "unasked")
)


def slides(family: str) -> bool:
    """Whether layers of a tiny model slide."""
    return "sliding_window" in FAMILIES[family][2]


def small(family: str = "llama", layers: int = 3, **options: object) -> PreTrainedModel:
    """A tiny model with a small budget; top-k where the options choose nothing else."""
    return patch_model(tiny_model(family, num_hidden_layers=layers), *SMALL, **_with_selection(options))


def full(family: str = "llama", layers: int = 3, **options: object) -> PreTrainedModel:
    """A tiny model that attends every key, through the sparse operations; top-k as in ``small``."""
    return patch_model(tiny_model(family, num_hidden_layers=layers), *FULL, **_with_selection(options))


def full_and_small(family: str, layers: int = 3, **options: object) -> list[tuple[PreTrainedModel, PreTrainedModel]]:
    """Models and what must give their numbers: a full budget with the dense model, a small one with itself."""
    model = small(family, layers, **options)
    return [(full(family, layers, **options), tiny_model(family, num_hidden_layers=layers)), (model, model)]


def _with_selection(options: dict[str, Any]) -> dict[str, Any]:
    chooses = options.keys() & {"selection", "prefill", "decode", *UNASKED}
    return options if chooses else TOPK | options


def assert_close(found: Any, expected: Any, atol: float = 2e-5) -> None:
    """Tensors, or lists of them, are equal but for rounding."""
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def state_of(model: PreTrainedModel) -> tuple[Any, ...]:
    """What a call or a calibration, done or failed, must leave as it was: of a model, the thread and the library."""
    of_modules = [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    of_weights = [(p.requires_grad, p.grad) for p in model.parameters()]
    settings = is_patched(model), model.config._attn_implementation, model.config.to_json_string()
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads()
    return of_modules, of_weights, settings, modes, stats._LOCK._is_owned()


def attended_fraction(model: PreTrainedModel) -> float:
    """How much of what it saw a patched model attended."""
    fraction = nc_stats(model)["attended_fraction"]
    assert fraction is not None, "nothing ran through the patch"
    return fraction


def generated(model: PreTrainedModel, batch: Any, **options: Any) -> torch.Tensor:
    """The six new tokens of a batch, or of rows of ids ``[B, L]``."""
    torch.manual_seed(5)
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6, "disable_compile": True} | options
    batch = batch if isinstance(batch, dict) else {"input_ids": batch}
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


def generated_alone(model: PreTrainedModel, prompts: list[list[int]], count: int) -> dict[str, list[Any]]:
    """For each prompt by itself the greedy ``tokens``, so many, and their ``logprobs``."""
    how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    found: dict[str, list[Any]] = {"tokens": [], "logprobs": []}
    for ids in (torch.tensor([prompt]) for prompt in prompts):
        given = {"attention_mask": torch.ones_like(ids), "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(ids, **given, **how)
        new = out.sequences[0, ids.shape[1] :]
        found["tokens"].append(new.tolist())
        found["logprobs"].append(torch.cat(out.logits).log_softmax(-1).gather(1, new[:, None]).flatten().tolist())
    return found


def rows_of(count: int, shortest: int = 20, step: int = 7) -> list[torch.Tensor]:
    """Up to eight rows of random ids, each of another length."""
    return [random_ids(shortest + step * (3 * place % 8)) for place in range(count)]


def left_padded(rows: list[torch.Tensor], side: str = "left") -> dict[str, torch.Tensor]:
    """Rows of ids ``[L]``, none of which is 0, as a batch padded on one side: ``input_ids`` and ``attention_mask``."""
    ids = pad_sequence(rows, batch_first=True, padding_side=side)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


right_padded = partial(left_padded, side="right")


def with_holes(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A left-padded batch in whose longer rows padding of 3, 7, ... places follows the first nine tokens."""
    holes = [torch.zeros(3 + 4 * (place % 4) if len(row) > 9 else 0).long() for place, row in enumerate(rows)]
    return left_padded([torch.cat((row[:9], hole, row[9:])) for row, hole in zip(rows, holes, strict=True)])


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Positions that count the tokens of a padding mask."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def boundaries(kind: str, lengths: list[int]) -> dict[str, Any]:
    """What a caller may say of where packed sequences begin."""
    named: dict[str, Any] = {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}
    if kind == "cu_seq_lens":
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        named |= {f"cu_seq_lens_{of}": ends for of in "qk"} | {f"max_length_{of}": max(lengths) for of in "qk"}
    if kind == "seq_idx":
        named["seq_idx"] = torch.arange(len(lengths)).int().repeat_interleave(torch.tensor(lengths))[None]
    return named


def dynamic_cache(config: Any) -> DynamicCache:
    return DynamicCache(config=config)


def static_cache(config: Any) -> StaticCache:
    return StaticCache(config=config, max_cache_len=250)


# The ways: a model and rows of ids ``[L]`` → the logits of each row, ``[L, vocabulary]``.
Rows = list[torch.Tensor]


def alone(model: Callable[..., Any], rows: Rows) -> Rows:
    return [model(row[None], use_cache=False).logits[0] for row in rows]


def in_a_batch(model: Callable[..., Any], rows: Rows, pad: Any = left_padded, cache: Any = None) -> Rows:
    batch = pad(rows)
    held = None if cache is None else cache(model.config)
    options = {"position_ids": positions_of(batch["attention_mask"]), "past_key_values": held}
    logits = model(**batch, use_cache=held is not None, **options).logits
    return [logits[place][tokens] for place, tokens in enumerate(batch["attention_mask"].bool())]


def by_a_mask_of_four_dimensions(model: Callable[..., Any], rows: Rows, added: bool) -> Rows:
    batch = left_padded(rows)
    kept = batch["attention_mask"].bool()
    mask = torch.ones(kept.shape[1], kept.shape[1], dtype=torch.bool).tril() & kept[:, None, None]
    given = torch.where(mask, 0.0, torch.finfo(torch.float32).min) if added else mask
    logits = model(batch["input_ids"], attention_mask=given, position_ids=positions_of(batch["attention_mask"])).logits
    return [logits[place][tokens] for place, tokens in enumerate(kept)]


def packed(model: Callable[..., Any], rows: Rows, kind: str, filler: int | None = None, **options: Any) -> Rows:
    """``filler`` puts padding after each row, of which positions say that it is ``filler``."""
    gaps = [0 if filler is None else 1 + place % 4 for place in range(len(rows))]
    padded = [torch.cat((row, row.new_zeros(gap))) for row, gap in zip(rows, gaps, strict=True)]
    ids, named = torch.cat(padded)[None], boundaries(kind, [len(row) for row in padded])
    mask = ids != 0
    if filler is not None:
        named |= {"position_ids": named["position_ids"].masked_fill(~mask, filler), "attention_mask": mask.long()}
    logits = model(ids, **named, **options).logits[mask]
    return list(logits.split([len(row) for row in rows]))


def in_pieces(model: Callable[..., Any], rows: Rows, cuts: Callable[[int], Any], cache: Any = dynamic_cache) -> Rows:
    """A batch padded on the left on a cache, the model's own where ``cache`` is None, cut at ``cuts`` of its length."""
    batch, logits = left_padded(rows), []
    mask, held = batch["attention_mask"], None if cache is None else cache(model.config)
    for first, last in itertools.pairwise(cuts(mask.shape[1])):
        options = {"attention_mask": None if mask.all() else mask[:, :last], "past_key_values": held, "use_cache": True}
        ids, positions = (of[:, first:last] for of in (batch["input_ids"], positions_of(mask)))
        out = model(ids, position_ids=positions, **options)
        held = out.past_key_values
        logits.append(out.logits)
    return [row[tokens] for row, tokens in zip(torch.cat(logits, 1), mask.bool(), strict=True)]


def anywhere(length: int) -> tuple[int, ...]:
    """The first pieces hold only padding of some rows, the last ones several queries, and one."""
    return (0, 1, 17, 38, 39, 60, length - 4, length - 1, length)


def at_query_blocks(length: int) -> list[int]:
    """Multiples of 64 tokens; the last piece has more queries than a decoding call."""
    return [0, *range(64, length - 32, 64), length]


def each_in_pieces(model: Callable[..., Any], rows: Rows, **options: Any) -> Rows:
    return [in_pieces(model, [row], **options)[0] for row in rows]


def while_training(model: PreTrainedModel, rows: Rows) -> Rows:
    with torch.inference_mode(False), torch.enable_grad():
        try:
            return [logits.detach() for logits in alone(model.train(), rows)]
        finally:
            model.eval()


WAYS: dict[str, Callable[[Any, Rows], Rows]] = {
    "padded left": in_a_batch,
    "padded right": partial(in_a_batch, pad=right_padded),
    "holes": partial(in_a_batch, pad=with_holes),
    "holes, dynamic cache": partial(in_a_batch, pad=with_holes, cache=dynamic_cache),
    "holes, static cache": partial(in_a_batch, pad=with_holes, cache=static_cache),
    "bool mask of four dimensions": partial(by_a_mask_of_four_dimensions, added=False),
    "added mask of four dimensions": partial(by_a_mask_of_four_dimensions, added=True),
    "packed by positions": partial(packed, kind="positions", use_cache=False),
    "packed by lengths": partial(packed, kind="cu_seq_lens", use_cache=False),
    "packed by numbers": partial(packed, kind="seq_idx", use_cache=False),
    "packed, with a cache": partial(packed, kind="positions", use_cache=True),
    "packed by lengths, with a cache": partial(packed, kind="cu_seq_lens", use_cache=True),
    "packed by positions, padding between": partial(packed, kind="positions", filler=1),
    "packed by positions, padding that counts as 0": partial(packed, kind="positions", filler=0),
    "packed by lengths, padding between": partial(packed, kind="cu_seq_lens", filler=99),
    "packed by numbers, padding between": partial(packed, kind="seq_idx", filler=99),
    "packed, with a mask of ones": lambda model, rows: packed(
        model, rows, "position_ids", attention_mask=torch.ones(1, sum(map(len, rows)))
    ),
    "in pieces": partial(in_pieces, cuts=anywhere),
    "in pieces, static cache": partial(in_pieces, cuts=anywhere, cache=static_cache),
    "cut at query blocks": partial(each_in_pieces, cuts=at_query_blocks),
    "cut at query blocks, static cache": partial(each_in_pieces, cuts=at_query_blocks, cache=static_cache),
    "token by token": lambda model, rows: in_pieces(model, rows[:1], cuts=lambda length: range(length + 1)),
    "while training": while_training,
}
# What blocks of queries, or decoding by another selection, need not score as the whole sequence does.
CUTS = ("in pieces", "in pieces, static cache", "token by token")
# Windows of layers that slide count places, so that rows with holes are compared with dense ones of the same holes; and
# a mask of the caller's has none.
BY_PLACE = tuple(name for name in WAYS if "holes" in name)
WITHOUT_WINDOWS = tuple(name for name in WAYS if "four dimensions" in name)

"""What every family is put through, and what comes of it: one ``Outcome`` a family, for the tests and for the table.

The reference is the family's own dense model. What a family cannot do when dense, such as packed sequences, is found
out first, and then nothing more is asked of the patched model than to do the same.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import ways
from family_shapes import NOT_BUILT, VOCABULARY, Family, tiny_model
from transformers import PreTrainedModel

from nc_patch import UnsupportedMaskError, UnsupportedModelError, nc_stats, patch_model, unpatch_model

LENGTH, PADDING, STEPS = 41, 12, 4
# Ways of running a model that begin with what it gives alone.
AS_ALONE = ("padded", "packed", "chunks", "steps")
# Rounding of logits, for logits of size 1 and, relatively, for larger ones.
TOLERANCE = 2e-5
# Where two runs of a dense model differ by more than this, they are not meant to be the same.
DIFFERENT = 1e-3
FULL = {
    "topk": {"alpha": 500.0, "C": 0.0, "dense_below": 0},
    "window": {"alpha": 500.0, "C": 0.0, "dense_below": 0},
    "block": {"alpha": 500.0, "C": 0.0, "dense_below": 0, "block_size": 16},
    "dense": {"alpha": 1.0, "C": 1.0},
}
_BUDGET = {"alpha": 1.0, "C": 0.5, "dense_below": 0, "sink_keys": 1}
SMALL: dict[str, dict[str, Any]] = {
    "topk": {"selection": "topk", "tail": "drop", **_BUDGET},
    "topk by an index, with means": {"selection": "topk", "tail": "mean", "key_index": "always", **_BUDGET},
    "window": {"selection": "window", **_BUDGET},
}
# Decoding by pages chooses for itself, so that it is compared with decoding by pages that are made anew each time.
PAGES = {"selection": "block", "block_size": 16, **_BUDGET}


@dataclass
class Outcome:
    """What came of one family.

    Attributes:
        name, class_name: the family.
        not_built: why it cannot be built here, or None.
        refused: why it is refused, or None; ``refused_at`` says when: "patching" or "the first call".
        prefill, decode, packed: "yes", or what the dense model cannot do either.
        dense: what runs dense, or has no attention to patch, and why.
        wrong: what was found to be wrong; empty for a family that is supported or refused.
    """

    name: str
    class_name: str
    not_built: str | None = None
    refused: str | None = None
    refused_at: str | None = None
    prefill: str = ""
    decode: str = ""
    packed: str = ""
    dense: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class _Runs:
    """The ways of running one model that are compared."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config = model.eval(), model.config
        self.takes = set(inspect.signature(type(model).forward).parameters)
        generator = torch.Generator().manual_seed(7)
        # No token comes twice: in layers without positions its keys would tie, and rounding decide which is attended.
        self.ids, self.other = (
            torch.randperm(VOCABULARY - 2, generator=generator)[:n] + 2 for n in (LENGTH, LENGTH + PADDING)
        )
        with torch.inference_mode():
            given = self(self.ids[None], position_ids=torch.arange(LENGTH)[None], use_cache=False).logits[0]
            # It does not count positions from 0: it is given none.
            if _difference(given, self.logits("prefill")) > DIFFERENT:
                self.takes.discard("position_ids")

    def __call__(self, input_ids: torch.Tensor, **arguments: Any) -> Any:
        arguments = {name: value for name, value in arguments.items() if name in self.takes and value is not None}
        return self.model(input_ids=input_ids, **arguments)

    def logits(self, way: str) -> torch.Tensor:
        """What it gives in a way of ``RUNS``."""
        return RUNS[way](self, self.ids, self.other)


def generated(runs: _Runs, ids: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Logits of a few greedy steps after the left-padded batch."""
    how = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "disable_compile": True}
    how |= {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "pad_token_id": 0}
    out = runs.model.generate(**ways.left_padded([ids, other]), **how)
    return torch.stack(out.logits, 1).flatten(0, 1)


def in_pieces(*cuts: int) -> Callable[..., torch.Tensor]:
    """A run on the model's own cache, cut there."""
    return lambda runs, ids, _: ways.in_pieces(runs, [ids], lambda length: (0, *cuts, length), cache=None)[0]


RUNS: dict[str, Callable[[_Runs, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "prefill": lambda runs, ids, _: ways.alone(runs, [ids])[0],
    "single": lambda runs, ids, _: ways.alone(runs, [ids[:1]])[0],
    "pair": lambda runs, ids, _: ways.alone(runs, [ids[:2]])[0],
    "padded": lambda runs, ids, other: torch.cat(ways.in_a_batch(runs, [ids, other])),
    "packed": lambda runs, ids, other: ways.packed(runs, [other, ids], "positions", use_cache=False)[1],
    "packed, with a cache": lambda runs, ids, other: ways.packed(runs, [other, ids], "positions", use_cache=True)[1],
    "chunks": in_pieces(14, 15, 30),
    "steps": in_pieces(*range(LENGTH - 12, LENGTH)),
    "generated": generated,
}


def examine(family: Family) -> Outcome:
    """Puts one family through the suite."""
    outcome = Outcome(family.name, family.class_name)
    try:
        model = tiny_model(family)
    except Exception:
        outcome.not_built = NOT_BUILT.get(family.name)
        if outcome.not_built is None:
            raise
        return outcome
    own = model.config._attn_implementation
    try:
        patch_model(model, **FULL["topk"])
    except UnsupportedModelError as error:
        outcome.refused, outcome.refused_at = str(error), "patching"
        if model.config._attn_implementation != own:
            outcome.wrong.append("a refused model was changed")
        return outcome
    unpatch_model(model)
    runs = _Runs(model)
    patch_model(model, **FULL["topk"])
    with torch.inference_mode():
        try:
            runs.logits("prefill")
        except (UnsupportedModelError, UnsupportedMaskError) as error:
            outcome.refused, outcome.refused_at = str(error), "the first call"
            return outcome
        unpatch_model(model)
        _examine_supported(model, family, runs, outcome)
    return outcome


def _examine_supported(model: PreTrainedModel, family: Family, runs: _Runs, outcome: Outcome) -> None:
    before, reference = runs.logits("prefill"), _Runs(tiny_model(family, "eager"))
    alone = reference.logits("prefill")
    expected, able = {"prefill": alone}, {}
    for way in ("single", "pair", *AS_ALONE, "generated"):
        try:
            expected[way] = reference.logits(way)
        except Exception as error:  # whatever a dense model cannot do is recorded, and not asked of a patched one
            able[way] = f"not when dense either ({type(error).__name__})"
            continue
        same = way not in AS_ALONE or _difference(expected[way][: len(alone)], alone) < DIFFERENT
        able[way] = "yes" if same else "as dense"
    if able["packed"] == "as dense":  # which does not look where sequences begin; a patched model does if it is told
        patch_model(model, **FULL["topk"])
        found = runs.logits("packed")
        if _difference(found, alone) < DIFFERENT:
            expected["packed"], able["packed"] = alone, "yes, unlike when dense"
        elif _difference(found, expected["packed"]) > DIFFERENT and nc_stats(model)["left_dense"]:
            # Other layers, such as those of linear attention, carry a state over from sequence to sequence.
            expected["packed"], able["packed"] = found, "in attention layers alone"
        unpatch_model(model)
    for selection, options in FULL.items():
        patch_model(model, selection=selection, **options)
        for way, dense in expected.items():
            _same(outcome, f"full budget, {selection}", runs, way, dense)
        chunks = getattr(model.config.get_text_config(), "attention_chunk_size", None)
        if selection == "topk" and able["packed"].startswith("yes") and not chunks:
            _same(outcome, "full budget", runs, "packed, with a cache", alone)
        stats = nc_stats(model)
        if idle := [layer["name"] for layer in stats["layers"] if not layer["calls"]]:
            outcome.wrong.append(f"patched, but never called: {', '.join(idle)}")
        parts = stats["left_dense"]
        outcome.dense = [f"{len(part['names'])} × {part['kind']}: {part['reason']}" for part in parts]
        unpatch_model(model)
    for selection, options in SMALL.items():
        patch_model(model, **options)
        whole = runs.logits("prefill")
        if _difference(whole, before) < DIFFERENT:
            outcome.wrong.append(f"a small budget changes nothing, {selection}")
        for way in AS_ALONE:
            if able[way].startswith("yes"):
                _same(outcome, f"small budget, {selection}", runs, way, whole)
        unpatch_model(model)
    if "steps" in expected:
        patch_model(model, key_index="never", **PAGES)
        by_new_pages = runs.logits("steps")
        patch_model(model, key_index="always", **PAGES)
        _same(outcome, "small budget, block by kept pages", runs, "steps", by_new_pages)
        unpatch_model(model)
    if not torch.equal(runs.logits("prefill"), before):
        outcome.wrong.append("the output after unpatching is not bit for bit what it was")
    outcome.prefill = _say({"at once": "yes", "padded batches": able["padded"], "in pieces": able["chunks"]})
    outcome.decode = _say({"generate": able["generated"], "on a cache that is handed on": able["steps"]})
    outcome.packed = able["packed"]


def _say(ways: dict[str, str]) -> str:
    exceptions = [f"{name} {able}" for name, able in ways.items() if able != "yes"]
    if len(exceptions) == len(ways) and not any(able == "as dense" for able in ways.values()):
        return "not when dense either"
    return "yes" if not exceptions else "yes, but " + ", ".join(exceptions)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value where that is above 1; infinite where NaN comes in."""
    if a.shape != b.shape:
        return float("inf")
    scale = max(1.0, float(b.abs().max()))
    difference = float((a - b).abs().max()) / scale
    return difference if difference == difference else float("inf")


def _same(outcome: Outcome, budget: str, runs: _Runs, way: str, expected: torch.Tensor) -> None:
    try:
        difference = _difference(runs.logits(way)[: len(expected)], expected)
    except Exception as error:  # it ran dense: any error is a finding, named with its type
        outcome.wrong.append(f"{way}, {budget}: {type(error).__name__}: {error}")
        return
    if difference > TOLERANCE:
        outcome.wrong.append(f"{way}, {budget}: differs by {difference:.1e}")

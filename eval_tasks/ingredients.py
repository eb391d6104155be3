"""What a sweep is made of, loaded and checked: text, tokenizer, tasks, and the model with every method."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from eval_tasks.answers import check_generated
from eval_tasks.errors import EvalError
from eval_tasks.matching import load_profile
from eval_tasks.measure import warm_up
from eval_tasks.methods import Method, find_method
from eval_tasks.models import ModelSource, find_model, load_model, load_tokenizer, max_positions
from eval_tasks.presses import find_press
from eval_tasks.sweep import Sweep
from eval_tasks.synthetic import GENERATORS, Material
from eval_tasks.tasks import LM_EVAL, TASKS, TokenisedText, check_lengths, places, tokenise
from eval_tasks.texts import Text, load_text
from nc_patch import ProfileError

if TYPE_CHECKING:
    from eval_tasks.lm_eval.in_sweep import LmEvalTasks


@dataclass(frozen=True)
class Ingredients:
    """All that samples are built from.

    Attributes:
        text, tokens: the text, as it is and by the tokenizer.
        tokenizer: of the model.
        starts: where in the text the samples of each seed begin; none where no task takes stretches of it.
        material: what generated tasks draw from.
        foreign: what runs the tasks of lm-eval; None where none is asked for, since importing lm-eval takes seconds.
    """

    text: Text
    tokenizer: PreTrainedTokenizerBase
    tokens: TokenisedText
    starts: dict[int, list[int]]
    material: Material
    foreign: "LmEvalTasks | None"


def load_ingredients(sweep: Sweep) -> Ingredients:
    """Loads what samples are built from, and checks that every task can be built at every length.

    Raises:
        EvalError: something is missing, or a length or task does not fit the model, text or tokenizer.
    """
    text = load_text(sweep.text)
    source = find_model(sweep.model, sweep.revision, sweep.trust_remote_code)
    _check_positions(sweep, max_positions(source))
    tokenizer = load_tokenizer(source)
    tokens = tokenise(tokenizer, text.content)
    scored = [TASKS[name] for name in sweep.tasks if name in TASKS]
    check_lengths(scored, sweep.layout, len(tokens.prefix))
    material = Material(sweep.text, sweep.hub_copies)
    generated = [name for name in sweep.tasks if name in GENERATORS]
    check_generated(generated, sweep.layout.lengths, sweep.layout.seed, material)
    foreign = _lm_eval_tasks(sweep, source)
    starts = {seed: places(tokens, replace(sweep.layout, seed=seed)) if scored else [] for seed in sweep.seeds}
    return Ingredients(text, tokenizer, tokens, starts, material, foreign)


def load_model_of(sweep: Sweep, device: str) -> Any:
    """The model of a sweep, on a device or spread as the sweep says."""
    return load_model(
        *(sweep.model, sweep.dtype, device, sweep.device_map, sweep.tp_plan),
        revision=sweep.revision,
        trust_remote_code=sweep.trust_remote_code,
    ).model


def check_methods(sweep: Sweep, model: Any) -> None:
    """Tries every method on a few tokens, which also takes its one-off costs out of the first measurement.

    Raises:
        EvalError: a method does not run on the model, or the profile is of another one.
    """
    if sweep.budgets.profile is not None:
        try:
            load_profile(sweep.budgets.profile).check_model(model)
        except ProfileError as error:
            raise EvalError(str(error)) from error
    for name in sweep.methods:
        _check_method(sweep, model, find_method(name))


def _check_positions(sweep: Sweep, positions: int | None) -> None:
    longest = max(sweep.layout.lengths)
    if positions is not None and longest > positions:
        raise EvalError(
            f"length {longest:,} is beyond the {positions:,} positions of {sweep.model} (max_position_embeddings); "
            "leave it out of --lengths"
        )


def _check_method(sweep: Sweep, model: Any, method: Method) -> None:
    if method.press is not None:
        find_press(method.press)
        if sweep.phase not in ("question", "decode"):
            raise EvalError(
                f"{method.name} compresses what a dense prefill left, which is not what the other methods do; measure "
                "all of them that way with --phase question or --phase decode"
            )
        return
    try:
        warm_up(model, method.config(sweep.budgets.at(max(sweep.layout.lengths))))
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise EvalError(f"the method {method.name} does not run on this model and device: {error}") from error


def _lm_eval_tasks(sweep: Sweep, source: ModelSource) -> "LmEvalTasks | None":
    if not any(name.startswith(LM_EVAL) for name in sweep.tasks):
        return None
    if sweep.phase != "all":
        raise EvalError(f"lm-eval's own evaluator knows no phases: leave out --phase {sweep.phase}")
    if any(find_method(name).press is not None for name in sweep.methods):
        raise EvalError("lm-eval's own evaluator runs no presses of kvpress: leave them out")
    from eval_tasks.lm_eval.in_sweep import LmEvalTasks

    return LmEvalTasks(
        source.location,
        source.options,
        sweep.layout.samples * len(sweep.seeds),
        sweep.layout.seed,
        sweep.text,
        sweep.answer_tokens,
        sweep.hub_copies,
    )

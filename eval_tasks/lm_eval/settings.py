"""What lm-eval's ``--metadata`` and ``--model_args`` say about a task: the tokenizer, the lengths, the numbers."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.models.utils import resolve_max_length
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from eval_tasks.errors import EvalError
from eval_tasks.hub_data import cache_only_where_offline
from eval_tasks.lm_eval.options import located
from eval_tasks.synthetic.fitting import Count, counter
from eval_tasks.tasks import ascending
from eval_tasks.texts import PYTHON_REFERENCE
from nc_patch.common import as_integer, plain

# Where this package's tasks lie, for lm-eval's --include_path.
TASKS_DIRECTORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Settings:
    """What ``--metadata`` says, with the tokenizer of the model under test.

    ``lengths`` ascend, in tokens; by default those of 512, 1024, 2048 and 4096 that the model has positions for.
    ``text`` is a name as ``load_text`` takes it, ``hub_copies`` a directory with copies of the hub's data sets. There
    are ``samples`` at each length, of which so many tokens are ``scored``, or are the ``passage``, for tasks that have
    these.
    """

    lengths: tuple[int, ...]
    seed: int
    text: str
    hub_copies: str | None
    tokenizer: PreTrainedTokenizerBase
    count: Count
    samples: int
    scored: int = 0
    passage: int = 0


def read_settings(task: str, given: Mapping[str, Any], **numbers: int) -> Settings:
    """Checks what the command line gave a task: ``--metadata`` merged with ``--model_args``.

    ``numbers`` are the positive integers among the settings, with their defaults. Raises EvalError where a value is out
    of range, both names of the lengths are given, or no tokenizer is named.
    """
    chosen = {name: given.get(name, default) for name, default in numbers.items()}
    for name, value in chosen.items():
        if (as_integer(value) or 0) < 1:
            raise EvalError(f"{name} must be a positive integer, got {value!r}")
    seed = as_integer(given.get("seed", 0))
    if seed is None:
        raise EvalError(f"seed must be an integer, got {given['seed']!r}")
    lengths = [given[name] for name in ("lengths", "max_seq_lengths") if given.get(name) is not None]
    if len(lengths) > 1:
        raise EvalError("lengths and max_seq_lengths mean the same: give one of them")
    model = located(given)
    tokenizer = tokenizer_of(model, task)
    ordered = checked_lengths(lengths[0] if lengths else None, max_length_of(model, tokenizer))
    count, text = counter(tokenizer, model.get("add_bos_token")), given.get("text", PYTHON_REFERENCE)
    return Settings(ordered, seed, text, given.get("hub_copies"), tokenizer, count, **chosen)


def tokenizer_of(model: Mapping[str, Any], task: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lm-eval's model would load from the same arguments; raises EvalError where there is none."""
    given = model.get("tokenizer") or model.get("pretrained") or model.get("model")
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if given is None:
        raise EvalError(
            f"{task} measures context in tokens: give pretrained=... in --model_args, or tokenizer=... in --metadata"
        )
    options = {"trust_remote_code": False, **_loading(model, "add_bos_token")}
    if model.get("tokenizer"):
        options.pop("gguf_file", None)
    name = given if isinstance(given, str) else given.name_or_path
    try:
        with nullcontext() if Path(name).is_dir() else cache_only_where_offline():
            return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise EvalError(
            f"the tokenizer {name} cannot be loaded: {reason} Give tokenizer=... in --metadata: a directory, or a name"
            " on the hub where that can be reached"
        ) from error


def max_length_of(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The length at which lm-eval's Hugging Face model would cut contexts off; None for other kinds of model."""
    if model.get("max_length") is not None:
        return int(model["max_length"])
    given = model.get("pretrained")
    config = AutoConfig.from_pretrained(given, **_loading(model)) if isinstance(given, str) else given and given.config
    return resolve_max_length(config, tokenizer) if config else None


def checked_lengths(lengths: Sequence[int] | int | None, limit: int | None) -> tuple[int, ...]:
    """The lengths in ascending order, or the defaults; raises EvalError for one beyond the model's positions."""
    if lengths is None:
        lengths = [length for length in (512, 1024, 2048, 4096) if limit is None or length <= limit]
        if not lengths:
            raise EvalError(f"the model has {limit} positions: give lengths of at most {limit} in --metadata")
    listed = plain(lengths)
    given = [as_integer(n) for n in (listed if isinstance(listed, list | tuple) else [listed])]
    if None in given or not given:
        raise EvalError(f"lengths must be a list of integers, got {lengths!r}")
    ordered = ascending([n for n in given if n is not None])
    if limit is not None and ordered[-1] > limit:
        raise EvalError(f"lengths {[n for n in ordered if n > limit]} exceed the {limit} positions of the model")
    return ordered


def _loading(model: Mapping[str, Any], *further: str) -> dict[str, Any]:
    names = ("revision", "trust_remote_code", "gguf_file", "subfolder", *further)
    return {name: model[name] for name in names if model.get(name) is not None}

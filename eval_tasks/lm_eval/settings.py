"""What lm-eval's ``--metadata`` and ``--model_args`` say about a task: the tokenizer, the lengths, the numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.models.utils import resolve_max_length
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.options import located
from eval_tasks.models import ModelSource
from eval_tasks.synthetic.fitting import Count, counter
from eval_tasks.tasks import ascending
from eval_tasks.texts import PYTHON_REFERENCE
from nc_patch.calibration.profile import checked_count

# Where this package's tasks lie, for lm-eval's --include_path.
TASKS_DIRECTORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Settings:
    """What ``--metadata`` says, with the tokenizer of the model under test.

    ``lengths`` ascend, in tokens; by default those of 512, 1024, 2048 and 4096 that the model has positions for.
    ``text`` is a name as ``load_text`` takes it. There are ``samples`` at each length, of which so many tokens are
    ``scored``, or are the ``passage``, for tasks that have these.
    """

    lengths: tuple[int, ...]
    seed: int
    text: str
    tokenizer: PreTrainedTokenizerBase
    count: Count
    samples: int
    scored: int = 0
    passage: int = 0


def read_settings(task: str, given: Mapping[str, Any], **numbers: int) -> Settings:
    """Checks what the command line gave a task: ``--metadata`` merged with ``--model_args``.

    ``numbers`` are the positive integers among the settings, with their defaults. Raises EvalError or ProfileError
    where a value is out of range, both names of the lengths are given, or no tokenizer is named.
    """
    chosen = {name: checked_count(name, given.get(name, default)) for name, default in numbers.items()}
    seed, model = checked_count("seed", given.get("seed", 0), least=0), located(given)
    tokenizer = _tokenizer_of(model, task)
    lengths = _lengths_of(given, _max_length_of(model, tokenizer))
    count, text = counter(tokenizer, model.get("add_bos_token")), given.get("text", PYTHON_REFERENCE)
    return Settings(lengths, seed, text, tokenizer, count, **chosen)


def _tokenizer_of(model: Mapping[str, Any], task: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lm-eval's model would load from the same arguments; raises EvalError where there is none."""
    given = model.get("tokenizer") or model.get("pretrained") or model.get("model")
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if given is None:
        raise EvalError(
            f"{task} measures context in tokens: give pretrained=... in --model_args, or tokenizer=... in --metadata"
        )
    name = given if isinstance(given, str) else given.name_or_path
    options = {"trust_remote_code": False, **_loading(model, "add_bos_token")}
    if model.get("tokenizer"):
        options.pop("gguf_file", None)
    try:
        return ModelSource(name, name, options).load(AutoTokenizer)
    except EvalError as error:
        raise EvalError(f"no tokenizer: {error} Or give another's, as tokenizer=... in --metadata") from error


def _max_length_of(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The length at which lm-eval's Hugging Face model would cut contexts off; None for other kinds of model."""
    if model.get("max_length") is not None:
        return int(model["max_length"])
    given = model.get("pretrained")
    config = AutoConfig.from_pretrained(given, **_loading(model)) if isinstance(given, str) else given and given.config
    return resolve_max_length(config, tokenizer) if config else None


def _lengths_of(given: Mapping[str, Any], limit: int | None) -> tuple[int, ...]:
    """The lengths in ascending order, or the defaults; raises for one beyond the model's positions."""
    listed = [given[name] for name in ("lengths", "max_seq_lengths") if given.get(name) is not None]
    if len(listed) > 1:
        raise EvalError("lengths and max_seq_lengths mean the same: give one of them")
    default = [length for length in (512, 1024, 2048, 4096) if limit is None or length <= limit]
    found = listed[0] if listed else default
    if not found:
        raise EvalError(f"lengths must be a list of integers, of at most the {limit} positions of the model")
    each = found if isinstance(found, list | tuple) else [found]
    lengths = ascending([checked_count("lengths", n, least=2) for n in each])
    if limit is not None and lengths[-1] > limit:
        raise EvalError(f"lengths {[n for n in lengths if n > limit]} exceed the {limit} positions of the model")
    return lengths


def _loading(model: Mapping[str, Any], *further: str) -> dict[str, Any]:
    names = ("revision", "trust_remote_code", "gguf_file", "subfolder", *further)
    return {name: model[name] for name in names if model.get(name) is not None}

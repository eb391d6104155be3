"""What lm-eval's ``--model_args`` say about a model, and with ``--metadata`` about a task: tokenizer, lengths, numbers.

Settings are read before any model is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lm_eval.models.utils import resolve_max_length
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from eval_tasks.errors import EvalError
from eval_tasks.models import ModelSource, find_model
from eval_tasks.synthetic.fitting import Count, counter
from eval_tasks.tasks import ascending
from eval_tasks.texts import PYTHON_REFERENCE
from nc_patch.calibration.profile import Profile, checked_count
from nc_patch.config import NCConfig, option_owners

# Where this package's tasks lie, for lm-eval's --include_path.
TASKS_DIRECTORY = Path(__file__).resolve().parents[1]
OPTIONS = (*(field.name for field in fields(NCConfig)), "selection", *option_owners())
# HFLM has an argument of the same name as NCConfig.backend; their values differ, so the value says which is meant.
_HFLM_BACKENDS = ("default", "causal", "seq2seq")


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


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides model arguments into the options of ``NCConfig`` and what is left for ``HFLM``."""
    options, others = dict[str, Any](), dict[str, Any]()
    for name, value in arguments.items():
        is_option = name in OPTIONS and not (name == "backend" and value in _HFLM_BACKENDS)
        (options if is_option else others)[name] = value
    return {name: value for name, value in options.items() if value is not None}, others


def located(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with ``pretrained`` resolved by ``find_model``, so that ``smollm2`` and ``.gguf`` files work."""
    name = arguments.get("pretrained")
    if not isinstance(name, str) or arguments.get("gguf_file") or arguments.get("subfolder"):
        return dict(arguments)
    source = find_model(name)
    return {**source.options, **arguments, "pretrained": source.location}


def read_config(
    options: Mapping[str, Any],
    nc_config: NCConfig | Mapping[str, Any] | str | None = None,
    profile: Profile | None = None,
) -> NCConfig:
    """The ``NCConfig`` that model arguments describe; raises EvalError, which says what to give, where they do not.

    ``options`` are by name, as ``--model_args`` gives them; ``dense_layers`` may be ``0+1+29``. In their place
    ``nc_config`` is a JSON file that ``NCConfig.to_json`` wrote, a mapping, or an ``NCConfig``; in place of alpha and
    C there may be a calibrated profile.
    """
    dense = options.get("dense_layers", ())
    if isinstance(dense, int | str):
        options = {**options, "dense_layers": [int(n) if n.isdecimal() else n for n in str(dense).split("+")]}
    try:
        if nc_config is not None:
            if options or profile is not None:
                raise EvalError(f"nc_config holds every setting: leave out {', '.join(options) or 'profile'}")
            if isinstance(nc_config, NCConfig):
                return nc_config
            if isinstance(nc_config, Mapping):
                return NCConfig.from_dict(nc_config)
            return NCConfig.from_json(Path(nc_config).read_text(encoding="utf-8"))
        if profile is not None:
            return profile.config(**options)
        if missing := [name for name in ("alpha", "C") if name not in options]:
            raise EvalError(
                f"{' and '.join(missing)} missing: give the factor and the exponent of the budget k(n) = alpha * n**C,"
                " for example alpha=2,C=0.7 (C=0 is a fixed budget), or nc_config=FILE or profile=FILE"
            )
        return NCConfig(**options)
    except (OSError, TypeError, ValueError) as error:
        raise EvalError(str(error)) from error

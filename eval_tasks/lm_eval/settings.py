"""What lm-eval's ``--metadata`` and ``--model_args`` say about a task: the tokenizer, the lengths, the numbers."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lm_eval.models.utils import resolve_max_length
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from eval_tasks.errors import EvalError
from eval_tasks.hub_data import cache_only_where_offline
from eval_tasks.lm_eval.options import located
from eval_tasks.tasks import ascending
from nc_patch.common import as_integer, plain

# Where this package's tasks lie, for lm-eval's --include_path.
TASKS_DIRECTORY = Path(__file__).resolve().parents[1]

LENGTHS = (512, 1024, 2048, 4096)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the tasks by context length have in common.

    Attributes:
        lengths: context lengths in tokens, ascending.
        samples: how many samples at each length.
        seed: of the samples.
        tokenizer: of the model under test.
        add_bos_token: whether the model adds special tokens to a text; None leaves it to the tokenizer.
    """

    lengths: tuple[int, ...]
    samples: int
    seed: int
    tokenizer: PreTrainedTokenizerBase
    add_bos_token: bool | None

    def encode(self, text: str) -> list[int]:
        """The tokens that the model reads of a text on its own."""
        options = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        ids: list[int] = self.tokenizer.encode(text, **options)
        return ids


def read_settings(
    task: str,
    defaults: Sequence[int],
    samples: int,
    *,
    lengths: Sequence[int] | int | None,
    max_seq_lengths: Sequence[int] | int | None,
    seed: int,
    model: Mapping[str, Any],
) -> Settings:
    """Checks what the command line gave.

    Args:
        task: named in errors.
        defaults: lengths where none are given; those the model has no positions for are left out.
        samples: how many samples.
        lengths: context lengths in tokens.
        max_seq_lengths: the same under the name that lm-eval's own ``ruler`` has for it.
        seed: of the samples.
        model: the model's arguments.

    Raises:
        EvalError: a value is out of range, both names of the lengths are given, or no tokenizer is named.
    """
    positive(samples=samples)
    number = as_integer(seed)
    if number is None:
        raise EvalError(f"seed must be an integer, got {seed!r}")
    if lengths is not None and max_seq_lengths is not None:
        raise EvalError("lengths and max_seq_lengths mean the same: give one of them")
    model = located(model)
    tokenizer = tokenizer_of(model, task)
    given = max_seq_lengths if lengths is None else lengths
    checked = checked_lengths(given, max_length_of(model, tokenizer), defaults)
    return Settings(checked, int(samples), number, tokenizer, model.get("add_bos_token"))


def positive(**values: Any) -> None:
    """Raises EvalError for a value that is no positive integer."""
    for name, value in values.items():
        if (as_integer(value) or 0) < 1:
            raise EvalError(f"{name} must be a positive integer, got {value!r}")


def tokenizer_of(model: Mapping[str, Any], task: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lm-eval's Hugging Face model would load from the same arguments.

    Args:
        model: the model's arguments, with ``pretrained`` located.
        task: named in errors.

    Raises:
        EvalError: none of ``tokenizer``, ``pretrained`` and ``model`` (its name for APIs) is given, or it cannot be
            loaded.
    """
    given = model.get("tokenizer") or model.get("pretrained") or model.get("model")
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if given is None:
        raise EvalError(
            f"{task} measures context in tokens: give pretrained=... in --model_args, or tokenizer=... in --metadata"
        )
    options = {"revision": model.get("revision", "main"), "trust_remote_code": model.get("trust_remote_code", False)}
    if model.get("gguf_file") and not model.get("tokenizer"):
        options["gguf_file"] = model["gguf_file"]
    for name in ("add_bos_token", "subfolder"):
        if model.get(name) is not None:
            options[name] = model[name]
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
    pretrained = model.get("pretrained")
    if pretrained is None:
        return None
    if not isinstance(pretrained, str):
        return resolve_max_length(pretrained.config, tokenizer)
    options = {
        name: model[name] for name in ("revision", "trust_remote_code", "gguf_file", "subfolder") if name in model
    }
    return resolve_max_length(AutoConfig.from_pretrained(pretrained, **options), tokenizer)


def checked_lengths(
    lengths: Sequence[int] | int | None, limit: int | None, defaults: Sequence[int] = LENGTHS
) -> tuple[int, ...]:
    """The lengths in ascending order, or those of the defaults that the model has positions for.

    Raises:
        EvalError: a length is no integer, below 2, given twice, or beyond the model's positions.
    """
    if lengths is None:
        lengths = [length for length in defaults if limit is None or length <= limit]
        if not lengths:
            raise EvalError(f"the model has {limit} positions: give lengths of at most {limit} in --metadata")
    listed = plain(lengths)
    several = isinstance(listed, Iterable) and not isinstance(listed, str)
    given = [as_integer(n) for n in (listed if several else [listed])]
    if None in given or not given:
        raise EvalError(f"lengths must be a list of integers, got {lengths!r}")
    ordered = ascending([n for n in given if n is not None])
    if limit is not None and ordered[-1] > limit:
        raise EvalError(f"lengths {[n for n in ordered if n > limit]} exceed the {limit} positions of the model")
    return ordered

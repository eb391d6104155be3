"""The lm-eval task ``nc_perplexity``: the same last tokens under a growing left context.

One document is one passage scored once per context length, so ``--limit N`` takes N passages at every length, and the
lengths are compared on the same tokens, placed as in the harness's own task ``perplexity``. Nothing here needs
``nc_patch``: any of lm-eval's models can run the task.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_aggregation
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import resolve_max_length
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.options import located
from eval_tasks.lm_eval.passages import cut_passages
from eval_tasks.tasks import TASKS, Layout, ascending, check_lengths, tokenise
from eval_tasks.texts import PYTHON_REFERENCE, load_text

LENGTHS = (512, 1024, 2048, 4096)
SCORED = 256
SAMPLES = 16

_log = logging.getLogger(__name__)


class PerplexityByLength(ConfigurableTask):
    """Perplexity and bits per byte of each passage's end, one metric per context length.

    Args:
        config: the YAML's settings, as lm-eval's task manager hands them over.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config={name: value for name, value in (config or {}).items() if name != "class"})
        # lm-eval writes the metadata beside the results; defaults and the text's hash belong there too.
        row = self.dataset["test"][0]
        resolved = {"lengths": row["lengths"], "text_origin": row["text"], "text_sha256": row["text_sha256"]}
        self.config.metadata = {**(self.config.metadata or {}), **resolved, "samples": len(self.dataset["test"])}

    @property
    def lengths(self) -> list[int]:
        """The context lengths, ascending, in tokens."""
        return self.dataset["test"][0]["lengths"]

    def build_all_requests(self, *, tokenizer_name: str = "", **options: Any) -> None:
        """Builds the requests; lm-eval's cache of built requests is told these documents from others'."""
        if options.get("apply_chat_template") or options.get("system_instruction"):
            _log.warning("nc_perplexity scores plain text: no chat template and no system instruction is applied")
        content = json.dumps(self.dataset["test"].to_list(), sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:16]
        super().build_all_requests(tokenizer_name=f"{tokenizer_name}-{key}", **options)

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **options: Any) -> list[Instance]:
        """One log-likelihood request per context length."""
        return [
            Instance(
                request_type="loglikelihood",
                doc=doc,
                arguments=(context, doc["continuation"]),
                idx=index,
                metadata=options["metadata"],
            )
            for index, context in enumerate(doc["contexts"])
        ]

    def process_results(self, doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        """Per length, the log-likelihood with the number of tokens and of bytes that it covers."""
        size = len(doc["continuation"].encode("utf-8"))
        scores: dict[str, Any] = {}
        for length, tokens, (loglikelihood, _) in zip(doc["lengths"], doc["scored_tokens"], results, strict=True):
            scores[f"perplexity_{length}"] = (loglikelihood, tokens)
            scores[f"bits_per_byte_{length}"] = (loglikelihood, size)
        return scores

    def aggregation(self) -> dict[str, Callable[[Sequence[Any]], float]]:
        """How each metric is taken over passages: ``exp(-Σll / Σtokens)`` and ``-Σll / (Σbytes · ln 2)``."""
        rules = {"perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}
        return {f"{name}_{length}": get_aggregation(rule) for length in self.lengths for name, rule in rules.items()}

    def higher_is_better(self) -> dict[str, bool]:
        """Every metric is better when lower."""
        return dict.fromkeys(self.aggregation(), False)


def documents(
    *,
    lengths: Sequence[int] | int | None = None,
    scored: int = SCORED,
    samples: int = SAMPLES,
    seed: int = 0,
    text: str = PYTHON_REFERENCE,
    **model: Any,
) -> dict[str, Dataset]:
    """The passages of ``nc_perplexity``; its arguments are lm-eval's ``--metadata``, merged with ``--model_args``.

    Args:
        lengths: context lengths in tokens of the model's tokenizer; by default those of 512, 1024, 2048 and 4096 that
            the model has positions for.
        scored: tokens scored at the end of each context.
        samples: how many passages.
        seed: of their places in the text.
        text: where they come from: ``python-reference``, a file or a data set, as ``eval_tasks.texts.load_text`` says.
        model: the model's arguments: ``tokenizer`` or ``pretrained`` names the tokenizer, ``pretrained`` and
            ``max_length`` limit the lengths.

    Returns:
        ``{"test": Dataset}``, one row per passage.

    Raises:
        EvalError: no tokenizer is named, a setting is out of range, or the text is too short.
    """
    for name, value in (("scored", scored), ("samples", samples)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise EvalError(f"{name} must be a positive integer, got {value!r}")
    model = located(model)
    tokenizer = _tokenizer(model)
    layout = Layout(_checked_lengths(lengths, _max_length(model, tokenizer)), samples, scored, passage=0, seed=seed)
    source = load_text(text)
    tokens = tokenise(tokenizer, source.content)
    check_lengths([TASKS["perplexity"]], layout, len(tokens.prefix))
    add_special = model.get("add_bos_token")
    options = {} if add_special is None else {"add_special_tokens": add_special}
    cut = cut_passages(source.content, tokens, layout, lambda part: tokenizer.encode(part, **options))
    origin = {"lengths": layout.lengths, "text": source.origin, "text_sha256": source.sha256}
    return {"test": Dataset.from_list([dataclasses.asdict(passage) | origin for passage in cut])}


def _tokenizer(model: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that lm-eval's Hugging Face model would load from the same arguments."""
    given = model.get("tokenizer") or model.get("pretrained")
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if given is None:
        raise EvalError(
            "nc_perplexity measures context in tokens: give pretrained=... in --model_args, or tokenizer=... in"
            " --metadata"
        )
    options = {"revision": model.get("revision", "main"), "trust_remote_code": model.get("trust_remote_code", False)}
    if model.get("gguf_file") and not model.get("tokenizer"):
        options["gguf_file"] = model["gguf_file"]
    for name in ("add_bos_token", "subfolder"):
        if model.get(name) is not None:
            options[name] = model[name]
    return AutoTokenizer.from_pretrained(given if isinstance(given, str) else given.name_or_path, **options)


def _max_length(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> int | None:
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


def _checked_lengths(lengths: Sequence[int] | int | None, limit: int | None) -> tuple[int, ...]:
    if lengths is None:
        lengths = [length for length in LENGTHS if limit is None or length <= limit]
        if not lengths:
            raise EvalError(f"the model has {limit} positions: give lengths of at most {limit} in --metadata")
    given = [lengths] if isinstance(lengths, int | str) else list(lengths)
    wrong = [n for n in given if isinstance(n, bool) or not isinstance(n, int)]
    if wrong or not given:
        raise EvalError(f"lengths must be a list of integers, got {lengths!r}")
    ordered = ascending(given)
    if limit is not None and ordered[-1] > limit:
        raise EvalError(f"lengths {[n for n in ordered if n > limit]} exceed the {limit} positions of the model")
    return ordered

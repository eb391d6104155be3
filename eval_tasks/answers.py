"""Generated tasks in a sweep: a question about a long context, its answer token by token, and whether that is right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from eval_tasks.errors import EvalError
from eval_tasks.measure import Attention, Phase, in_phase, only_last, with_cache
from eval_tasks.metrics.string_match.string_match import score
from eval_tasks.peak import Peak, memory_watched
from eval_tasks.synthetic import GENERATORS, chat, synthesize
from eval_tasks.synthetic.fitting import tokens_of

# With phase "question" so many last tokens of a prompt count as the question, which stands at its end.
QUESTION_TOKENS = 64
# Of what a model says so much is kept.
KEPT_LETTERS = 400


@dataclass(frozen=True)
class Question:
    """A prompt as tokens, int64 ``[N]``, and what is expected, as in ``SyntheticSample``.

    ``depth`` is where the first sentence of evidence lies, as a share of the prompt; None without evidence.
    """

    ids: np.ndarray
    answers: tuple[str, ...]
    new_tokens: int
    depth: float | None


def check_generated(names: Sequence[str], lengths: Sequence[int]) -> None:
    """Raises EvalError for a length that is too short for a generated task."""
    for name in names:
        shortest = GENERATORS[name].shortest
        if min(lengths) < shortest:
            raise EvalError(f"length {min(lengths)} is too short for the task {name}, which needs {shortest} tokens")


def build_question(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    index: int,
    text: str,
    new_tokens: int | None = None,
) -> Question:
    """A sample of a generated task, in the tokenizer's chat template where it has one; arguments as of ``synthesize``.

    Raises EvalError where the length cannot be filled.
    """
    options: dict[str, Any] = {"text": text, "new_tokens": new_tokens}
    if tokenizer.chat_template:
        options["render"] = chat(tokenizer)
    sample = synthesize(GENERATORS[name], tokenizer, length, seed, index, **options)
    ids = np.asarray(tokens_of(tokenizer, sample.prompt), dtype=np.int64)
    depth = sample.depths[0] if sample.depths else None
    return Question(ids, sample.answers, sample.new_tokens, depth)


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, attention: Attention, question: Question, phase: Phase = "all"
) -> dict[str, Any]:
    """Lets a model that is not patched answer greedily, and scores what it says.

    The context of ``phase`` is the prompt but for its last token, or for its last ``QUESTION_TOKENS`` where the phase
    is ``"question"``. Returns fields of a row: the score in [0, 1], what was said, the depth of the evidence,
    ``first_token_seconds`` until the first token of the answer, and the fields of ``in_phase``, whose scored positions
    are those that predict a token of the answer. Raises MemoryRanOut once what was allocated is free again.
    """
    ids = torch.from_numpy(question.ids).to(model.device)
    before = len(ids) - (QUESTION_TOKENS if phase == "question" else 1)
    ends = end_tokens(model, tokenizer)

    def read(cache: DynamicCache | None, peak: Peak) -> tuple[list[int], int, int]:
        rest = ids if cache is None else ids[before:]
        cache = DynamicCache(config=model.config) if cache is None else cache
        said = _greedy(model, rest, len(ids), cache, question.new_tokens, ends, peak)
        return said, len(ids) - before + len(said) - 1, len(said)

    with memory_watched(len(ids)):
        said, counts = in_phase(phase, model, attention, ids[:before], 1, read)
    text = tokenizer.decode(said, skip_special_tokens=True)
    return {
        "score": score(text, question.answers),
        "said": text[:KEPT_LETTERS],
        "expected": list(question.answers),
        "prompt_tokens": len(ids),
        "said_tokens": len(said),
        **({} if question.depth is None else {"depth": question.depth}),
        **counts,
    }


def _greedy(
    model: Any, rest: torch.Tensor, length: int, cache: DynamicCache, new_tokens: int, ends: set[int], peak: Peak
) -> list[int]:
    """The likeliest token after another, up to one that ends the answer; ``rest`` are the last of ``length`` tokens."""
    said: list[int] = []
    step, first = rest[None], length - len(rest)
    while len(said) < new_tokens:
        positions = torch.arange(first, first + step.shape[1], device=rest.device)[None]
        options = {**with_cache(model, cache), **only_last(model, 1)}
        logits = model(input_ids=step, position_ids=positions, use_cache=True, **options).logits
        token = int(logits[0, -1].argmax())
        first += step.shape[1]
        said.append(token)
        if len(said) == 1:
            peak.mark("first_token_seconds")
        if token in ends:
            break
        step = torch.tensor([[token]], device=rest.device)
    return said


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer."""
    found = model.generation_config.eos_token_id
    ids = found if isinstance(found, list) else [found]
    return {token for token in (*ids, tokenizer.eos_token_id) if token is not None}

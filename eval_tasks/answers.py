"""Generated tasks in a sweep: a question about a long context, its answer token by token, and whether that is right."""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from eval_tasks.measure import Attention, Phase, forward, in_phase
from eval_tasks.metrics.string_match.string_match import score
from eval_tasks.peak import Peak, memory_watched
from eval_tasks.synthetic import SyntheticSample
from eval_tasks.synthetic.fitting import tokens_of

# With phase "question" so many last tokens of a prompt count as the question, which stands at its end.
QUESTION_TOKENS = 64
# Of what a model says so much is kept.
KEPT_LETTERS = 400


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, attention: Attention, sample: SyntheticSample, phase: Phase = "all"
) -> dict[str, Any]:
    """Lets a model that is not patched answer greedily, and scores what it says.

    The context of ``phase`` is the prompt but for its last token, or for its last ``QUESTION_TOKENS`` where the phase
    is ``"question"``. Returns fields of a row: the score in [0, 1], what was said, the ``depth`` of the first sentence
    of evidence where there is one, as a share of the prompt, ``first_token_seconds`` until the first token of the
    answer, and the fields of ``in_phase``, whose scored positions are those that predict a token of the answer. Raises
    MemoryRanOut once what was allocated is free again.
    """
    ids = torch.tensor(tokens_of(tokenizer, sample.prompt), device=model.device)
    before = len(ids) - (QUESTION_TOKENS if phase == "question" else 1)
    ends = end_tokens(model, tokenizer)

    def read(cache: DynamicCache | None, peak: Peak) -> tuple[list[int], int, int]:
        rest = len(ids) if cache is None else len(ids) - before
        cache = DynamicCache(config=model.config) if cache is None else cache
        said = _greedy(model, ids, rest, cache, sample.new_tokens, ends, peak)
        return said, len(ids) - before + len(said) - 1, len(said)

    with memory_watched(len(ids)):
        said, counts = in_phase(phase, model, attention, ids[:before], 1, read)
    text = tokenizer.decode(said, skip_special_tokens=True)
    return {
        "score": score(text, sample.answers),
        "said": text[:KEPT_LETTERS],
        "expected": list(sample.answers),
        "prompt_tokens": len(ids),
        "said_tokens": len(said),
        **({"depth": sample.depths[0]} if sample.depths else {}),
        **counts,
    }


def _greedy(
    model: Any, ids: torch.Tensor, rest: int, cache: DynamicCache, new_tokens: int, ends: set[int], peak: Peak
) -> list[int]:
    """The likeliest token after another, up to one that ends the answer; the cache lacks the ``rest`` of ``ids``."""
    said: list[int] = []
    while len(said) < new_tokens and ends.isdisjoint(said):
        token = forward(model, ids, 1, cache, rest).argmax()
        said.append(int(token))
        if len(said) == 1:
            peak.mark("first_token_seconds")
        ids, rest = torch.cat([ids, token[None]]), 1
    return said


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer."""
    found = model.generation_config.eos_token_id
    ids = found if isinstance(found, list) else [found]
    return {token for token in (*ids, tokenizer.eos_token_id) if token is not None}

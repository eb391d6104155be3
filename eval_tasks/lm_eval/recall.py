"""The lm-eval task ``nc_recall``: perplexity of a passage that the model has read at the start of its context.

The same passage is scored behind filler of growing length, so lengths are compared on the same tokens. It is the
harness's own task ``recall`` for lm-eval, which takes strings, and at any length: the filler is prose that repeats
where the text ends, always without the passage.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from datasets import Dataset

from eval_tasks.errors import EvalError
from eval_tasks.lm_eval.settings import LENGTHS, Settings, positive, read_settings
from eval_tasks.models import tokenizer_fingerprint
from eval_tasks.synthetic.fitting import TOLERANCE, counter, fill
from eval_tasks.synthetic.haystack import Prose, load_prose
from eval_tasks.synthetic.sample import Material, Request
from eval_tasks.texts import PYTHON_REFERENCE

PASSAGE = 128
SAMPLES = 16
# Words before the passage, whose own start would otherwise serve as attention sink.
_LEAD = 24


def documents(
    *,
    lengths: Sequence[int] | int | None = None,
    max_seq_lengths: Sequence[int] | int | None = None,
    passage: int = PASSAGE,
    samples: int = SAMPLES,
    seed: int = 0,
    text: str = PYTHON_REFERENCE,
    **model: Any,
) -> dict[str, Dataset]:
    """The passages of ``nc_recall``; its arguments are lm-eval's ``--metadata``, merged with ``--model_args``.

    Args:
        lengths: tokens that the model reads, the passage's second copy included, in its own tokens; by default those of
            512, 1024, 2048 and 4096 that it has positions for.
        max_seq_lengths: the same under the name that lm-eval's own tasks have for it.
        passage: tokens of the passage, which are scored.
        samples: how many passages.
        seed: of their places in the text.
        text: where they come from, as ``eval_tasks.texts.load_text`` says; its prose is used.
        model: the model's arguments: ``tokenizer`` or ``pretrained`` names the tokenizer.

    Returns:
        ``{"test": Dataset}``, one row per passage, in the form of ``nc_perplexity``.

    Raises:
        EvalError: no tokenizer is named, a setting is out of range, or the text holds too little prose.
    """
    positive(passage=passage)
    settings = read_settings(
        "nc_recall", LENGTHS, samples, lengths=lengths, max_seq_lengths=max_seq_lengths, seed=seed, model=model
    )
    prose = load_prose(text)
    origin = {
        "lengths": list(settings.lengths),
        "text_origin": prose.origin,
        "text_sha256": prose.sha256,
        "tokenizer": tokenizer_fingerprint(settings.tokenizer),
    }
    return {"test": Dataset.from_list([_row(prose, settings, passage, i) | origin for i in range(samples)])}


def _row(prose: Prose, settings: Settings, passage: int, index: int) -> dict[str, Any]:
    count = counter(settings.tokenizer, settings.add_bos_token)
    draw = Request(0, settings.seed, index, Material(), "recall").random()
    start = draw.choice(prose.sentence_starts)
    size = fill(cache(lambda words: count(" ".join(prose.stretch(start, words)))), passage)
    if size + 2 * _LEAD > len(prose.words) // 2:
        raise EvalError(
            f"the text holds {len(prose.words)} words of prose, too few for a passage of {passage} tokens and filler;"
            " ask for a shorter passage, or give more text"
        )
    repeated = " ".join(prose.stretch(start, size))
    lead = " ".join(prose.stretch((start - _LEAD) % len(prose.words), _LEAD))
    # The rest of the text from behind the passage on, round to the lead.
    rest = prose.stretch((start + size) % len(prose.words), len(prose.words) - size - _LEAD)
    contexts, read, scored = [], [], []
    for length in settings.lengths:

        def context(words: int) -> str:
            whole, part = divmod(words, len(rest))
            return " ".join([lead, repeated, *(rest * whole), *rest[:part]])

        def total(words: int) -> int:
            return count(f"{context(words)} {repeated}")

        words = fill(cache(total), length)
        contexts.append(context(words))
        read.append(total(words))
        scored.append(read[-1] - count(contexts[-1]))
        if read[-1] < (1 - TOLERANCE) * length:
            raise EvalError(f"a word of the text {prose.origin} is too long to fill {length} tokens; got {read[-1]}")
    return {
        "contexts": contexts,
        "continuation": f" {repeated}",
        "context_tokens": read,
        "scored_tokens": scored,
    }

"""The tasks of a sweep, in one list: which tokens a model reads, and which of them are scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from eval_tasks.errors import EvalError


@dataclass(frozen=True)
class TokenisedText:
    """A text as tokens, int64 ``[N]``, and the bytes of UTF-8 and the letters up to the end of each, int64 ``[N]``.

    ``prefix`` are the tokens that the tokenizer puts before a text; those of the text are without.
    """

    ids: np.ndarray
    byte_ends: np.ndarray
    letter_ends: np.ndarray
    prefix: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """Token ids int64 ``[length + 1]``, of which all but the last are read, and how many of the last are scored."""

    ids: np.ndarray
    scored: int
    scored_bytes: int


@dataclass(frozen=True)
class Layout:
    """Where the samples of a sweep lie in the text, so that every length and method sees the same ones.

    Context lengths, in tokens, ascend; ``scored`` tokens count at the end of a sample of perplexity; recall repeats a
    ``passage`` of so many.
    """

    lengths: tuple[int, ...]
    samples: int
    scored: int
    passage: int
    seed: int

    @property
    def lead(self) -> int:
        """Tokens of text before the passage of recall, whose own start would otherwise serve as attention sink."""
        return self.passage // 4

    @property
    def slack(self) -> int:
        """Tokens at the start of a stretch among which the passage of recall is chosen."""
        return max(self.lengths) // 2

    @property
    def stretch(self) -> int:
        """Tokens of text that one sample takes up."""
        return self.lead + self.slack + max(self.lengths) + 1


@dataclass(frozen=True)
class Task:
    """One way to score a model at a context length; name, title and description are as in ``Method``.

    ``spans`` of (text, start of the place, length, layout) are what is read of the text, half-open, the last of them
    scored, and ``shortest`` is the shortest length, both without a prefix. One that is ``dense_only`` is a reference,
    measured with dense attention alone.
    """

    name: str
    title: str
    description: str
    spans: Callable[[TokenisedText, int, int, Layout], list[tuple[int, int]]]
    shortest: Callable[[Layout], int]
    dense_only: bool = False

    def build(self, text: TokenisedText, place: int, length: int, layout: Layout) -> Sample:
        """The sample of a length in the stretch of text that begins at ``place``."""
        spans = self.spans(text, place, length - len(text.prefix), layout)
        ids = [np.asarray(text.prefix, dtype=np.int64), *(text.ids[start:stop] for start, stop in spans)]
        start, stop = spans[-1]
        before = text.byte_ends[start - 1] if start else 0
        return Sample(np.concatenate(ids), stop - start, int(text.byte_ends[stop - 1] - before))


def tokenise(tokenizer: PreTrainedTokenizerBase, content: str) -> TokenisedText:
    """Tokenises a text, keeping the bytes that each token stands for, which fast tokenizers alone can tell."""
    encoded = tokenizer(content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    char_ends = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 1]
    widths = [len(char.encode()) for char in content]
    letters = [char.isalpha() for char in content]
    byte_ends, letter_ends = (np.append(0, np.cumsum(n, dtype=np.int64))[char_ends] for n in (widths, letters))
    whole = tokenizer("a", verbose=False)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return TokenisedText(ids, byte_ends, letter_ends, tuple(whole[:before]))


def places(text: TokenisedText, layout: Layout) -> list[int]:
    """The starts, in tokens, of ``layout.samples`` stretches of text that do not overlap, chosen by the seed.

    Fewer samples are the first of more. Raises EvalError where the text is too short.
    """
    slots = len(text.ids) // layout.stretch
    if slots < layout.samples:
        raise EvalError(
            f"the text has {len(text.ids):,} tokens; {layout.samples} samples of up to {max(layout.lengths):,} tokens "
            f"need {layout.samples * layout.stretch:,}. Ask for fewer samples or shorter lengths, or give more text."
        )
    chosen = np.random.default_rng(layout.seed).permutation(slots)[: layout.samples]
    return [int(slot) * layout.stretch for slot in chosen]


def check_lengths(tasks: Sequence[Task], layout: Layout, prefix: int) -> None:
    """Raises EvalError for a length that is too short for a task."""
    for task in tasks:
        needed = task.shortest(layout) + prefix
        if min(layout.lengths) < needed:
            raise EvalError(
                f"length {min(layout.lengths)} is too short for the task {task.name}, which needs {needed} tokens: "
                f"{layout.scored} scored (--scored), a passage of {layout.passage} (--passage)"
            )


def passage_start(text: TokenisedText, place: int, layout: Layout) -> int:
    """Where the passage of recall begins: the tokens near the start of the stretch that hold the most letters.

    That is prose where there is some. A model guesses tables, grammars and code without looking back, so they say
    little about recall. The choice depends on the text alone.
    """
    starts = place + layout.lead + np.arange(layout.slack + 1)
    before = np.where(starts > 0, text.letter_ends[starts - 1], 0)
    return int(starts[np.argmax(text.letter_ends[starts + layout.passage - 1] - before)])


def _perplexity(text: TokenisedText, place: int, length: int, layout: Layout) -> list[tuple[int, int]]:
    # The stretch ends at the same token for every length: what grows is the context to the left.
    stop = place + max(layout.lengths) + 1
    return [(stop - length - 1, stop - layout.scored), (stop - layout.scored, stop)]


def _recall(text: TokenisedText, place: int, length: int, layout: Layout) -> list[tuple[int, int]]:
    start = passage_start(text, place, layout)
    stop, lead = start + layout.passage, start - layout.lead
    return [(lead, stop), (stop, lead + length + 1 - layout.passage), (start, stop)]


def _unseen(text: TokenisedText, place: int, length: int, layout: Layout) -> list[tuple[int, int]]:
    start = passage_start(text, place, layout)
    stop = start + layout.passage
    return [(stop, start + length + 1), (start, stop)]


_RECALL = (
    "a few words, a passage, the text that follows it as filler, and the passage again, which is scored: only "
    "attention that reaches back to the first copy makes the second one easy"
)
_UNSEEN = "the passage of recall behind the filler alone, without its first copy: what recalling nothing looks like"
_PERPLEXITY = "the same last tokens of a stretch of text, under a left context that grows with the length"
_LISTED = (
    Task("recall", "recall perplexity", _RECALL, _recall, lambda layout: layout.lead + 2 * layout.passage),
    Task("unseen", "passage not seen before", _UNSEEN, _unseen, lambda layout: layout.passage + 1, dense_only=True),
    Task("perplexity", "perplexity", _PERPLEXITY, _perplexity, lambda layout: layout.scored),
)
TASKS: dict[str, Task] = {task.name: task for task in _LISTED}


def ascending(lengths: Sequence[int]) -> tuple[int, ...]:
    """The lengths in ascending order; raises EvalError for one that is below 2 or given twice."""
    if min(lengths) < 2:
        raise EvalError(f"lengths must be at least 2 tokens, got {min(lengths)}")
    if twice := [length for length in lengths if lengths.count(length) > 1]:
        raise EvalError(f"the length {twice[0]} is given twice")
    return tuple(sorted(lengths))

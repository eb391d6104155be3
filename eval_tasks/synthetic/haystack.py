"""What hides the facts: prose taken from a text, or the sentences about green grass that say nothing."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from eval_tasks.errors import EvalError
from eval_tasks.texts import Text, load_text

# The noise of Mohtashami & Jaggi (arXiv 2305.16300, section 4.3), which RULER repeats too.
NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")

_SENTENCE_END = re.compile(r'[.!?]["”’)]*$')
_LIST_MARK = re.compile(r"^(?:[*+-] |\d+\. )+")
_SHORTEST_PARAGRAPH = 12  # words
_LETTERS = 0.9  # share of letters and spaces in a paragraph of prose
_FEWEST_WORDS = 400


@dataclass(frozen=True)
class Prose:
    """The paragraphs of a text that are prose, as one run of words.

    ``sentence_starts`` are the indices of the first words of sentences, ascending from 0.
    """

    words: tuple[str, ...]
    sentence_starts: tuple[int, ...]
    text: Text

    def stretch(self, start: int, count: int) -> list[str]:
        """``count`` words from the word ``start`` on; behind the last word follows the first."""
        return [self.words[i % len(self.words)] for i in range(start, start + count)]

    def sentences(self, start: int, count: int) -> list[str]:
        """The same words as ``stretch``, joined to sentences; the last one may be cut short."""
        words = self.stretch(start, count)
        return [" ".join(words[begin:end]) for begin, end in pairwise([*_sentence_starts(words), count])]


@lru_cache(maxsize=4)
def load_prose(name: str) -> Prose:
    """The prose of a text, by its name as in ``load_text``: no code, tables or headings, repeated paragraphs once.

    Raises EvalError where there is too little.
    """
    text = load_text(name)
    pieces = re.split(r"\n\s*\n", text.content)
    paragraphs = dict.fromkeys(" ".join(_LIST_MARK.sub("", piece.strip()).split()) for piece in pieces)
    words = [word for paragraph in paragraphs if _is_prose(paragraph) for word in paragraph.split()]
    if len(words) < _FEWEST_WORDS:
        raise EvalError(
            f"the text {name!r} holds {len(words)} words of prose; a haystack needs {_FEWEST_WORDS}: paragraphs that a"
            " blank line divides, of twelve words or more, that end with a full stop and are mostly letters"
        )
    return Prose(tuple(words), tuple(_sentence_starts(words)), text)


def noise(count: int) -> list[str]:
    """Sentences of noise in lines of five, as RULER writes them; the last line may be shorter."""
    return [" ".join(NOISE[: count - begin]) for begin in range(0, count, len(NOISE))]


def insert(pieces: Sequence[str], inserted: Sequence[str], depths: Sequence[float]) -> list[str]:
    """The pieces with each inserted string at its depth in [0, 1]; depths ascend."""
    found = list(pieces)
    for i, (string, depth) in enumerate(zip(inserted, depths, strict=True)):
        found.insert(i + int(len(pieces) * depth), string)
    return found


def _is_prose(paragraph: str) -> bool:
    letters = sum(char.isalpha() or char == " " for char in paragraph)
    return (
        paragraph.count(" ") + 1 >= _SHORTEST_PARAGRAPH
        and _SENTENCE_END.search(paragraph) is not None
        and not paragraph.startswith((">>>", "...", "|"))
        and letters >= _LETTERS * len(paragraph)
    )


def _sentence_starts(words: Sequence[str]) -> list[int]:
    """Where a word with a capital follows the end of a sentence, and the first word."""
    opens = [word.lstrip("\"“‘'(*")[:1].isupper() for word in words]
    return [i for i in range(len(words)) if i == 0 or (opens[i] and _SENTENCE_END.search(words[i - 1]))]

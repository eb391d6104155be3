"""Words for keys and lists: the common English ones of ``words.txt``, and made-up ones where a list needs more."""

import random
from functools import cache
from importlib import resources

# Their order decides the samples. Paragraphs: adjectives, nouns, verbs.
_LISTS = resources.files("eval_tasks.synthetic").joinpath("words.txt").read_text(encoding="utf-8").split("\n\n")
ADJECTIVES, NOUNS, VERBS = (tuple(paragraph.split()) for paragraph in _LISTS)

_ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "gl", "kr", "pl")
_NUCLEI = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_CODAS = ("", "", "l", "m", "n", "r", "s", "t", "x")


@cache
def english_words() -> tuple[str, ...]:
    """Every adjective, noun and verb once, in alphabetical order."""
    return tuple(sorted({*ADJECTIVES, *NOUNS, *VERBS}))


class WordStream:
    """Distinct words without end: the English ones in an order that ``seed`` decides, then made-up ones."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        self._words = list(english_words())
        self._random.shuffle(self._words)
        self._known = set(self._words)

    def first(self, count: int) -> list[str]:
        """The first ``count`` words; the same however far the stream was read before."""
        draw = self._random.choice
        while len(self._words) < count:
            syllables = range(draw((2, 3, 3)))
            word = "".join(draw(_ONSETS) + draw(_NUCLEI) + draw(_CODAS) for _ in syllables)
            if word not in self._known:
                self._known.add(word)
                self._words.append(word)
        return self._words[:count]

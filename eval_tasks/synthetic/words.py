"""Words for keys and lists: the common English ones of ``words.txt``, and made-up ones where a list needs more."""

from collections.abc import Iterator
from functools import cache
from importlib import resources
from random import Random

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


def distinct_words(seed: str) -> Iterator[str]:
    """Words without end, each once: the English ones in an order that ``seed`` decides, then made-up ones."""
    random = Random(seed)
    words = list(english_words())
    random.shuffle(words)
    yield from words
    known = set(words)
    while True:
        syllables = range(random.choice((2, 3, 3)))
        word = "".join(random.choice(parts) for _ in syllables for parts in (_ONSETS, _NUCLEI, _CODAS))
        if word not in known:
            known.add(word)
            yield word

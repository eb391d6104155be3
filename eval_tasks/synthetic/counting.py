"""RULER's aggregation tasks (arXiv 2404.06654, section 3): the common words of a list, the frequent ones of a code."""

import math
import random
import string
from collections.abc import Sequence
from itertools import islice

import numpy as np

from eval_tasks.synthetic.sample import Generator, Recipe, Request
from eval_tasks.synthetic.words import distinct_words

_COMMON, _FREQUENT = 10, 3
_COMMON_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
_FREQUENT_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"
_TOKENS_PER_CODE = 50  # RULER has one coded word in its vocabulary for every 50 tokens


def _common_words(request: Request) -> Recipe:
    # Words of the worked example, and how often it and the list repeat (common, uncommon) words.
    if request.length >= 4096:
        shown, example_repeats, repeats = 40, (10, 3), (30, 3)
    elif request.length >= 1024:
        shown, example_repeats, repeats = 20, (3, 1), (6, 1)
    else:
        shown, example_repeats, repeats = 0, (0, 0), (3, 1)
    name = f"{request.key}/{request.seed}/{request.index}"
    stream, drawn = distinct_words(name), list[str]()

    def words(count: int) -> list[str]:
        drawn.extend(islice(stream, max(count - len(drawn), 0)))
        return drawn[:count]

    opening = ""
    if shown:
        listed = list(islice(distinct_words(f"{name}/example"), shown))
        asked = _common_question(listed, example_repeats, request.random("example"))
        opening = f"{asked} {_COMMON_PREFIX} {_numbered(listed[:_COMMON])}\n"

    def question(units: int, padding: int) -> str:
        # At least one word that is not common, and all of them less often than the common ones.
        return opening + _common_question(words(_COMMON + 1 + units), repeats, request.random("order"))

    return Recipe(question, _COMMON_PREFIX, tuple(words(_COMMON)))


def _common_question(words: list[str], repeats: tuple[int, int], draw: random.Random) -> str:
    items = words[:_COMMON] * repeats[0] + words[_COMMON:] * repeats[1]
    draw.shuffle(items)
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that"
        f" appear most often.\n{_numbered(items)}\nQuestion: What are the 10 most common words in the above list?"
    )


def _numbered(items: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(items, 1))


def _frequent_words(request: Request) -> Recipe:
    draw = request.random("vocabulary")
    codes: dict[str, None] = {}
    while len(codes) < max(request.length // _TOKENS_PER_CODE, _FREQUENT + 1):
        codes["".join(draw.choices(string.ascii_lowercase, k=6))] = None
    vocabulary = ["...", *codes]  # the first rank is noise, which the question tells to ignore
    # By Zipf's law with exponent 2.
    shares = np.arange(1, len(vocabulary) + 1, dtype=np.float64) ** -2.0 / (math.pi**2 / 6)

    def question(units: int, padding: int) -> str:
        # Enough words that the last of the three asked for stands more often than the next.
        counts = (shares * (units + 64)).astype(int)
        items = np.repeat(vocabulary, counts).tolist()
        request.random("order").shuffle(items)
        return (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently"
            f" appeared coded words. {' '.join(items)}\nQuestion: Do not provide any explanation. Please ignore the"
            " dots '....'. What are the three most frequently appeared words in the above coded text?"
        )

    return Recipe(question, _FREQUENT_PREFIX, tuple(vocabulary[1 : _FREQUENT + 1]))


COUNTING_GENERATORS: tuple[Generator, ...] = (
    Generator("cwe", "the ten words that stand most often in a numbered list", _common_words, 120),
    Generator("fwe", "the three coded words that stand most often", _frequent_words, new_tokens=50),
)

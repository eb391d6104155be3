"""RULER's aggregation tasks (arXiv 2404.06654, section 3): the common words of a list, the frequent ones of a code."""

import math
import random
import string

import numpy as np

from eval_tasks.synthetic.sample import Draft, Generator, Recipe, Request
from eval_tasks.synthetic.words import WordStream, english_words

_COMMON_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that"
    " appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
_COMMON_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
_COMMON = 10

_FREQUENT_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared"
    " coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the"
    " three most frequently appeared words in the above coded text?"
)
_FREQUENT_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"
_FREQUENT = 3
_ZIPF = 2.0  # exponent of the law by which frequencies fall with the rank
_CODE_LETTERS = 6
_TOKENS_PER_CODE = 50  # RULER has one coded word in its vocabulary for every 50 tokens


def _common_words(request: Request) -> Recipe:
    # (words of the worked example, its repetitions, the list's repetitions), of common and uncommon words.
    if request.length >= 4096:
        shown, example_repeats, repeats = 40, (10, 3), (30, 3)
    elif request.length >= 1024:
        shown, example_repeats, repeats = 20, (3, 1), (6, 1)
    else:
        shown, example_repeats, repeats = 0, (0, 0), (3, 1)
    stream = WordStream(f"{request.key}/{request.seed}/{request.index}")
    words = stream.first(_COMMON)
    opening = _worked_example(request, shown, example_repeats) if shown else ""

    def build(units: int, padding: int) -> Draft:
        # At least one word that is not common, and all of them less often than the common ones.
        uncommon = stream.first(_COMMON + 1 + units)[_COMMON:]
        context = _numbered_list(words * repeats[0] + uncommon * repeats[1], request.random("order"))
        return Draft(opening + _COMMON_TEMPLATE.format(context=context), _COMMON_PREFIX)

    return Recipe(build, tuple(words))


def _worked_example(request: Request, count: int, repeats: tuple[int, int]) -> str:
    words = WordStream(f"{request.key}/{request.seed}/{request.index}/example").first(count)
    items = words[:_COMMON] * repeats[0] + words[_COMMON:] * repeats[1]
    context = _numbered_list(items, request.random("example"))
    answer = " ".join(f"{i}. {word}" for i, word in enumerate(words[:_COMMON], 1))
    return f"{_COMMON_TEMPLATE.format(context=context)} {_COMMON_PREFIX} {answer}\n"


def _numbered_list(items: list[str], draw: random.Random) -> str:
    draw.shuffle(items)
    return " ".join(f"{i}. {word}" for i, word in enumerate(items, 1))


def _frequent_words(request: Request) -> Recipe:
    draw = request.random("vocabulary")
    codes: dict[str, None] = {}
    while len(codes) < max(request.length // _TOKENS_PER_CODE, _FREQUENT + 1):
        codes["".join(draw.choices(string.ascii_lowercase, k=_CODE_LETTERS))] = None
    # The first rank is noise, which the question tells to ignore.
    vocabulary = ["...", *codes]
    shares = np.arange(1, len(vocabulary) + 1, dtype=np.float64) ** -_ZIPF / (math.pi**2 / 6)

    def build(units: int, padding: int) -> Draft:
        # Enough words that the last of the three asked for stands more often than the next.
        counts = (shares * (units + 64)).astype(int)
        items = [code for code, count in zip(vocabulary, counts.tolist(), strict=True) for _ in range(count)]
        request.random("order").shuffle(items)
        return Draft(_FREQUENT_TEMPLATE.format(context=" ".join(items)), _FREQUENT_PREFIX)

    return Recipe(build, tuple(vocabulary[1 : _FREQUENT + 1]))


COUNTING_GENERATORS: tuple[Generator, ...] = (
    Generator(
        "cwe",
        "the ten words that stand most often in a numbered list",
        _common_words,
        new_tokens=120,
        chance=_COMMON / len(english_words()),
    ),
    Generator("fwe", "the three coded words that stand most often", _frequent_words, new_tokens=50),
)

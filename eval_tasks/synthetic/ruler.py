"""RULER's tasks (arXiv 2404.06654, section 3): needles, chains of variables, words; passkeys (arXiv 2305.16300)."""

import math
import random
import string
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from typing import Any, Literal

import numpy as np

from eval_tasks.synthetic.haystack import NOISE, insert, load_prose, noise
from eval_tasks.synthetic.sample import DEPTHS, Generator, Recipe, Request
from eval_tasks.synthetic.words import ADJECTIVES, NOUNS, distinct_words

Kind = Literal["words", "numbers", "uuids"]
Haystack = Literal["noise", "prose", "needles"]
_COMMON, _FREQUENT = 10, 3
_COMMON_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
_FREQUENT_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"
_TOKENS_PER_CODE = 50  # RULER has one coded word in its vocabulary for every 50 tokens


def _needles(
    request: Request,
    haystack: Haystack,
    keys: Kind = "words",
    values: Kind = "numbers",
    key_count: int = 1,
    values_per_key: int = 1,
    queried: int = 1,
) -> Recipe:
    """Needles at the depths of RULER's grid, around which the haystack is filled up.

    Each key has ``values_per_key`` needles, and ``queried`` of the keys are asked for.
    """
    draw = request.random("needles")
    some_key, some_value = _distinct(draw, keys), _distinct(draw, values)
    needle = f"One of the special magic {values} for {{}} is: {{}}.".format
    drawn = [(next(some_key), [next(some_value) for _ in range(values_per_key)]) for _ in range(key_count)]
    asked = [drawn[i] for i in sorted(draw.sample(range(key_count), queried))]
    needles = [needle(key, value) for key, own in drawn for value in own]
    draw.shuffle(needles)
    places = draw.sample(range(DEPTHS), len(needles)) if len(needles) > 1 else []
    depths = sorted(place / (DEPTHS - 1) for place in places) or [request.depth()]
    prose = load_prose(request.text) if haystack == "prose" else None
    start = request.random("prose").choice(prose.sentence_starts) if prose else 0
    others: list[str] = []

    def pieces(units: int) -> list[str]:
        """Sentences of noise, words of prose in sentences, or needles that nobody asks for."""
        if haystack == "noise":
            return noise(units)
        if prose:
            return prose.sentences(start, units)
        others.extend(needle(next(some_key), next(some_value)) for _ in range(len(others), units))
        return others[:units]

    answers = tuple(value for _, own in asked for value in own)
    some, verb, every, kind = ("A", "is", "", values[:-1]) if len(answers) == 1 else ("Some", "are", " all", values)
    *first, last = [key for key, _ in asked]
    query = f"{', '.join(first)}, and {last}" if first else last
    asks = f"special magic {kind} for {query} mentioned in the provided text"

    def question(units: int, padding: int) -> str:
        glue = " " if prose else "\n"
        context = glue.join([*noise(padding), *insert(pieces(units), needles, depths)])
        return (
            f"{some} special magic {kind} {verb} hidden within the following text. Make sure to memorize it. I will"
            f" quiz you about the {kind} afterwards.\n{context}\nWhat {verb}{every} the {asks}?"
        )

    evidence = tuple(needle(key, value) for key, own in asked for value in own)
    return Recipe(question, f"The {asks} {verb}", answers, evidence, padded=haystack == "needles")


def _distinct(draw: random.Random, kind: Kind) -> Iterator[str]:
    """Strings of a kind, without end and without repetition."""
    seen: set[str] = set()
    while True:
        if kind == "words":
            drawn = f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"
        elif kind == "numbers":
            drawn = str(draw.randint(10**6, 10**7 - 1))
        else:
            drawn = str(uuid.UUID(int=draw.getrandbits(128), version=4))
        if drawn not in seen:
            seen.add(drawn)
            yield drawn


def _passkey(request: Request) -> Recipe:
    key = str(request.random("key").randint(10_000, 99_999))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."

    def question(units: int, padding: int) -> str:
        # As in the original, the noise is one running text, and the needle stands between two of its sentences.
        context = " ".join(insert([NOISE[i % len(NOISE)] for i in range(units)], [needle], [request.depth()]))
        return (
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz"
            f" you about the important information there.\n{context}\nWhat is the pass key?"
        )

    return Recipe(question, "The pass key is", (key,), (needle,))


def _tracking(request: Request) -> Recipe:
    chain, example = _chain(request.random("chain"), letters=5), _chain(request.random("example"), letters=3)
    # RULER's worked example has 500 tokens, twelve lines of noise. Where that is more than a fifth of the length it is
    # shorter, and below 1,024 tokens there is none.
    lines = 12 if request.length >= 2560 else request.length // 512 - 1
    shown = f"{example.question(lines * len(NOISE), 0)} {example.prefix} {' '.join(example.answers)}\n\n"
    return replace(chain, question=lambda units, padding: shown * (lines > 0) + chain.question(units, padding))


def _chain(draw: random.Random, letters: int) -> Recipe:
    """A number that is assigned to a variable and copied from one to the next, and the question for all of them."""
    names: dict[str, None] = {}
    while len(names) < 5:
        names["".join(draw.choices(string.ascii_uppercase, k=letters))] = None
    value = draw.randint(10_000, 99_999)
    held = [str(value), *(f"VAR {name}" for name in names)]
    assignments = tuple(f"{later} = {earlier}" for earlier, later in pairwise(held))
    depths = sorted(draw.random() for _ in assignments)

    def question(units: int, padding: int) -> str:
        context = "\n".join(insert(noise(units), assignments, depths))
        return (
            f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
            f"Question: Find all variables that are assigned the value {value} in the text above."
        )

    # The misspelling is RULER's.
    prefix = (
        f"Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are"
        f" assgined the value {value}, they are:"
    )
    return Recipe(question, prefix, tuple(names), assignments)


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


def _niah(name: str, description: str, haystack: Haystack, **options: Any) -> Generator:
    return Generator(f"niah_{name}", description, partial(_needles, haystack=haystack, **options), new_tokens=128)


_LISTED = (
    _niah("single_1", "one number under a word, among sentences of noise", "noise"),
    _niah("single_2", "one number under a word, in prose", "prose"),
    _niah("single_3", "one UUID under a word, in prose", "prose", values="uuids"),
    _niah("multikey_1", "one of four numbers, each under its word, in prose", "prose", key_count=4),
    _niah("multikey_2", "one number under a word, among others of its kind and nothing else", "needles"),
    _niah("multikey_3", "one UUID under a UUID, among others alone", "needles", keys="uuids", values="uuids"),
    _niah("multivalue", "four numbers under one word, in prose", "prose", values_per_key=4),
    _niah("multiquery", "four numbers under four words, in prose", "prose", key_count=4, queried=4),
    Generator("passkey", "a five-digit key, said twice, among sentences of noise", _passkey, 16),
    Generator("vt", "five variables that hold a value, handed on by a chain of copies, in noise", _tracking, 30),
    Generator("cwe", "the ten words that stand most often in a numbered list", _common_words, 120),
    Generator("fwe", "the three coded words that stand most often", _frequent_words, new_tokens=50),
)
GENERATORS: dict[str, Generator] = {generator.name: generator for generator in _LISTED}

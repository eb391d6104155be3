"""RULER's needles in a haystack (arXiv 2404.06654, section 3), and the passkey among noise (arXiv 2305.16300)."""

import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from eval_tasks.synthetic.haystack import NOISE, noise
from eval_tasks.synthetic.sample import DEPTHS, Draft, Generator, Recipe, Request
from eval_tasks.synthetic.words import ADJECTIVES, NOUNS

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about"
    " the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided"
    " text?"
)
# RULER's wording where there is a single answer.
_TEMPLATE_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about"
    " the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text?"
)

Kind = Literal["words", "numbers", "uuids"]
Haystack = Literal["noise", "prose", "needles"]


@dataclass(frozen=True)
class NeedleTask:
    """Which needles lie in which haystack.

    Attributes:
        haystack: the noise sentences, prose, or other needles.
        keys: kind of the keys.
        values: kind of the values.
        key_count: how many keys.
        values_per_key: how many needles for each.
        queried: how many of the keys are asked for.
    """

    haystack: Haystack
    keys: Kind = "words"
    values: Kind = "numbers"
    key_count: int = 1
    values_per_key: int = 1
    queried: int = 1

    def recipe(self, request: Request) -> Recipe:
        """Needles at the depths of RULER's grid, around which the haystack is filled up."""
        draw = request.random("needles")
        keys, values = _distinct(draw, self.keys), _distinct(draw, self.values)
        drawn = [(next(keys), [next(values) for _ in range(self.values_per_key)]) for _ in range(self.key_count)]
        asked = [drawn[i] for i in sorted(draw.sample(range(self.key_count), self.queried))]
        needles = [self._needle(key, value) for key, values_of_key in drawn for value in values_of_key]
        draw.shuffle(needles)
        depths = self._depths(request, draw, len(needles))
        answers = tuple(value for _, values_of_key in asked for value in values_of_key)
        evidence = tuple(self._needle(key, value) for key, values_of_key in asked for value in values_of_key)
        pieces = self._pieces(request, keys, values)
        query = _listed([key for key, _ in asked])
        single = len(answers) == 1
        kind = self.values[:-1] if single else self.values
        verb = "is" if single else "are"
        prefix = f"The special magic {kind} for {query} mentioned in the provided text {verb}"
        glue = " " if self.haystack == "prose" else "\n"

        def build(units: int, padding: int) -> Draft:
            context = glue.join([*noise(padding), *insert(pieces(units), needles, depths)])
            template = _TEMPLATE_ONE if single else _TEMPLATE
            return Draft(template.format(kind=kind, context=context, query=query), prefix, evidence)

        return Recipe(build, answers, padded=self.haystack == "needles")

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.values, key=key, value=value)

    def _depths(self, request: Request, draw: random.Random, count: int) -> list[float]:
        if count == 1:
            return [request.depth()]
        return sorted(grid / (DEPTHS - 1) for grid in draw.sample(range(DEPTHS), count))

    def _pieces(self, request: Request, keys: Iterator[str], values: Iterator[str]) -> Callable[[int], list[str]]:
        """The haystack by its units: words of prose, sentences of noise, or needles that nobody asks for."""
        if self.haystack == "noise":
            return noise
        if self.haystack == "prose":
            prose = request.material.prose
            start = request.random("prose").choice(prose.sentence_starts)
            return lambda units: prose.sentences(start, units)
        others: list[str] = []

        def needles(units: int) -> list[str]:
            while len(others) < units:
                others.append(self._needle(next(keys), next(values)))
            return others[:units]

        return needles


def insert(pieces: list[str], inserted: list[str], depths: list[float]) -> list[str]:
    """The pieces with each inserted string at its depth in [0, 1]; depths ascend."""
    found: list[str] = []
    begin = 0
    for string, depth in zip(inserted, depths, strict=True):
        place = min(int(len(pieces) * depth), len(pieces))
        found.extend(pieces[begin:place])
        found.append(string)
        begin = place
    return found + pieces[begin:]


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


def _listed(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]


_PASSKEY_TEMPLATE = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you"
    " about the important information there.\n{context}\nWhat is the pass key?"
)


def _passkey(request: Request) -> Recipe:
    key = str(request.random("key").randint(10_000, 99_999))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    depth = request.depth()

    def build(units: int, padding: int) -> Draft:
        # As in the original, the noise is one running text, and the needle stands between two of its sentences.
        sentences = [NOISE[i % len(NOISE)] for i in range(units)]
        context = " ".join(insert(sentences, [needle], [depth]))
        return Draft(_PASSKEY_TEMPLATE.format(context=context), "The pass key is", (needle,))

    return Recipe(build, (key,))


_NIAH: dict[str, tuple[NeedleTask, str]] = {
    "niah_single_1": (NeedleTask("noise"), "one number under a word, among sentences of noise"),
    "niah_single_2": (NeedleTask("prose"), "one number under a word, in prose"),
    "niah_single_3": (NeedleTask("prose", values="uuids"), "one UUID under a word, in prose"),
    "niah_multikey_1": (NeedleTask("prose", key_count=4), "one of four numbers, each under its word, in prose"),
    "niah_multikey_2": (NeedleTask("needles"), "one number under a word, among others of its kind and nothing else"),
    "niah_multikey_3": (
        NeedleTask("needles", keys="uuids", values="uuids"),
        "one UUID under a UUID, among others of its kind and nothing else",
    ),
    "niah_multivalue": (NeedleTask("prose", values_per_key=4), "four numbers under one word, in prose"),
    "niah_multiquery": (NeedleTask("prose", key_count=4, queried=4), "four numbers under four words, in prose"),
}

NEEDLE_GENERATORS: tuple[Generator, ...] = (
    *(Generator(name, what, task.recipe, new_tokens=128) for name, (task, what) in _NIAH.items()),
    Generator("passkey", "a five-digit key, said twice, among sentences of noise", _passkey, 16, chance=1 / 90_000),
)

"""RULER's variable tracking (arXiv 2404.06654, section 3): which variables hold a value, through a chain of copies."""

import random
import string
from itertools import pairwise

from eval_tasks.synthetic.haystack import NOISE, insert, noise
from eval_tasks.synthetic.sample import Generator, Recipe, Request

_HOPS = 4
# Below the first length RULER's worked example (500 tokens) takes more than a fifth, so it shrinks; below the second it
# goes.
_SHORT, _SHORTEST = 2560, 1024
_EXAMPLE_LINES = 12  # lines of noise in the worked example at 2,560 tokens and above: 500 tokens


def _recipe(request: Request) -> Recipe:
    chain = _Chain(request.random("chain"), letters=5)
    example = _Chain(request.random("example"), letters=3)
    lines = _EXAMPLE_LINES if request.length >= _SHORT else request.length // 512 - 1
    shown = ""
    if request.length >= _SHORTEST:
        shown = f"{example.question(lines * len(NOISE))} {example.prefix} {' '.join(example.names)}\n\n"
    return Recipe(lambda units, _: shown + chain.question(units), chain.prefix, chain.names, chain.assignments)


class _Chain:
    """A number that is assigned to a variable and copied from one to the next."""

    def __init__(self, draw: random.Random, letters: int) -> None:
        names: dict[str, None] = {}
        while len(names) < _HOPS + 1:
            names["".join(draw.choices(string.ascii_uppercase, k=letters))] = None
        self.names = tuple(names)
        self.value = draw.randint(10_000, 99_999)
        copies = (f"VAR {later} = VAR {earlier}" for earlier, later in pairwise(names))
        self.assignments = (f"VAR {self.names[0]} = {self.value}", *copies)
        self.depths = sorted(draw.random() for _ in self.assignments)
        # The misspelling is RULER's.
        self.prefix = (
            f"Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are"
            f" assgined the value {self.value}, they are:"
        )

    def question(self, sentences: int) -> str:
        context = "\n".join(insert(noise(sentences), self.assignments, self.depths))
        return (
            f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
            f"Question: Find all variables that are assigned the value {self.value} in the text above."
        )


VARIABLE_TRACKING = Generator(
    "vt",
    "the five variables that hold a value, which a chain of four copies scattered over noise hands on",
    _recipe,
    new_tokens=30,
)

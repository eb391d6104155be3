"""RULER's variable tracking (arXiv 2404.06654, section 3): which variables hold a value, through a chain of copies."""

import random
import string

from eval_tasks.synthetic.haystack import NOISE, noise
from eval_tasks.synthetic.needles import insert
from eval_tasks.synthetic.sample import Draft, Generator, Recipe, Request

_TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
# The misspelling is RULER's.
_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the"
    " value {value}, they are:"
)
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

    def build(units: int, padding: int) -> Draft:
        return Draft(shown + chain.question(units), chain.prefix, chain.assignments)

    return Recipe(build, chain.names)


class _Chain:
    """A number that is assigned to a variable and copied from one to the next."""

    def __init__(self, draw: random.Random, letters: int) -> None:
        names: dict[str, None] = {}
        while len(names) < _HOPS + 1:
            names["".join(draw.choices(string.ascii_uppercase, k=letters))] = None
        self.names = tuple(names)
        self.value = draw.randint(10_000, 99_999)
        copies = (f"VAR {later} = VAR {earlier}" for earlier, later in zip(self.names, self.names[1:], strict=False))
        self.assignments = (f"VAR {self.names[0]} = {self.value}", *copies)
        self.depths = sorted(draw.random() for _ in self.assignments)
        self.prefix = _PREFIX.format(count=len(self.names), value=self.value)

    def question(self, sentences: int) -> str:
        lines = insert(noise(sentences), list(self.assignments), self.depths)
        return _TEMPLATE.format(context="\n".join(lines), value=self.value)


VARIABLE_TRACKING = Generator(
    "vt",
    "the five variables that hold a value, which a chain of four copies scattered over noise hands on",
    _recipe,
    new_tokens=30,
)

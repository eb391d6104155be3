"""What a generator of tasks is, and the sample of a length that it makes: a pure function of its arguments."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from transformers import PreTrainedTokenizerBase

from eval_tasks.errors import EvalError
from eval_tasks.synthetic.fitting import TOLERANCE, Count, Render, counter, fill
from eval_tasks.texts import PYTHON_REFERENCE

DEPTHS = 40  # RULER puts needles at this many evenly spaced depths


@dataclass(frozen=True)
class Request:
    """One sample that a generator is asked for, hidden in the prose of ``text``, a name as ``load_text`` takes it.

    ``key`` names the generator and is part of every seed.
    """

    length: int
    seed: int
    index: int
    text: str
    key: str

    def random(self, purpose: str = "") -> random.Random:
        """A stream of this sample's own, the same at every length, for one purpose."""
        return random.Random(f"{self.key}/{self.seed}/{self.index}/{purpose}")

    def depth(self) -> float:
        """A depth in [0, 1], one of 40; every 40 samples in a row take each once."""
        order = list(range(DEPTHS))
        random.Random(f"{self.key}/{self.seed}/depths/{self.index // DEPTHS}").shuffle(order)
        return order[self.index % DEPTHS] / (DEPTHS - 1)


@dataclass(frozen=True)
class Recipe:
    """How to build one sample around any amount of filler.

    ``question`` is the user's turn with (units of filler, sentences of padding), ``prefix`` the words that open the
    answer, which is searched for ``answers``. ``evidence`` are the sentences that it needs, each there exactly once;
    ``padded`` says whether padding evens out what one unit more would overfill.
    """

    question: Callable[[int, int], str]
    prefix: str
    answers: tuple[str, ...]
    evidence: tuple[str, ...] = ()
    padded: bool = False


@dataclass(frozen=True)
class Generator:
    """One task whose samples are generated at any length, from ``shortest`` tokens on with tokenizers of usual size.

    So many ``new_tokens`` are kept free for the answer, as in the original.
    """

    name: str
    description: str
    recipe: Callable[[Request], Recipe]
    new_tokens: int
    shortest: int = 512

    def answers(self, seed: int, index: int, text: str = PYTHON_REFERENCE) -> tuple[str, ...]:
        """The answers of a sample, which are the same at every length; no tokenizer is needed."""
        return self.recipe(Request(self.shortest, seed, index, text, self.name)).answers


@dataclass(frozen=True)
class SyntheticSample:
    """A prompt, its parts that are the user's turn and open the answer, and what is expected of the model.

    ``prompt_tokens``, special ones included, and the ``new_tokens`` kept free for the answer fill 98 to 100 % of the
    length. ``depths`` are where the sentences of evidence lie, as shares of the prompt's letters.
    """

    prompt: str = field(repr=False)
    question: str = field(repr=False)
    prefix: str
    answers: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    depths: tuple[float, ...]


def synthesize(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int = 0,
    index: int = 0,
    *,
    text: str = PYTHON_REFERENCE,
    new_tokens: int | None = None,
    render: Render = "{} {}".format,
    count: Count | None = None,
) -> SyntheticSample:
    """A sample that fills ``length`` tokens of the tokenizer, the answer's included, to 98 % or more and never over.

    Needles, keys and answers depend on the seed and the index alone, so samples of several lengths ask for the same
    things. Prose that hides them is of ``text``, as ``load_text`` takes it. ``render`` makes the prompt of a question
    and the words that open its answer: plain text, or a chat template by ``chat(tokenizer)``. ``new_tokens``, kept free
    for the answer, and ``count``, of tokens, take the place of the generator's and the tokenizer's. Raises EvalError
    where the length is too short, or the text says what is hidden in it.
    """
    count = count or counter(tokenizer)
    recipe = generator.recipe(Request(length, seed, index, text, generator.name))
    reserve = generator.new_tokens if new_tokens is None else new_tokens
    room = length - reserve

    @cache
    def measured(units: int, padding: int = 0) -> int:
        return count(render(recipe.question(units, padding), recipe.prefix))

    padding = 0
    try:
        units = fill(measured, room)
        if recipe.padded and room - measured(units) > TOLERANCE / 2 * length:
            padding = fill(lambda sentences: measured(units, sentences), room)
        tokens = measured(units, padding)
        if tokens + reserve < (1 - TOLERANCE) * length:
            raise EvalError(f"one step of filler more than {tokens + reserve} goes beyond them; ask for more")
    except EvalError as error:
        said = f"{generator.name} cannot fill {length} tokens, of which {reserve} are kept for the answer"
        raise EvalError(f"{said}: {error}") from error
    question = recipe.question(units, padding)
    prompt = render(question, recipe.prefix)
    for sentence in recipe.evidence:
        if (times := prompt.count(sentence)) != 1:
            said = f"{sentence!r} stands {times} times in the prompt, so the text {text!r} says it too"
            raise EvalError(f"{said}; give another text")
    depths = tuple(prompt.index(sentence) / len(prompt) for sentence in recipe.evidence)
    return SyntheticSample(prompt, question, recipe.prefix, recipe.answers, tokens, reserve, depths)

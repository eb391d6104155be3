"""What a generator of tasks is, and the sample of a length that it makes: a pure function of its arguments.

A context is filled to a number of tokens with a handful of tokenisations, whatever the length.
"""

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from eval_tasks.errors import EvalError
from eval_tasks.texts import PYTHON_REFERENCE

Render = Callable[[str, str], str]  # from a question and the words that open its answer to what the model reads
Count = Callable[[str], int]  # from a text to its number of tokens, those included that the tokenizer adds
TOLERANCE = 0.02  # share of the length that may stay empty
_CLOSE_ENOUGH = 0.002  # share of the room at which the search ends early
_PROBE = 32  # units of filler from which their size is first estimated
SHORTEST = 512  # tokens
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
    """One task whose samples are generated at any length, from ``SHORTEST`` tokens on with tokenizers of usual size.

    So many ``new_tokens`` are kept free for the answer, as in the original.
    """

    name: str
    description: str
    recipe: Callable[[Request], Recipe]
    new_tokens: int

    def answers(self, seed: int, index: int, text: str = PYTHON_REFERENCE) -> tuple[str, ...]:
        """The answers of a sample, which are the same at every length; no tokenizer is needed."""
        return self.recipe(Request(SHORTEST, seed, index, text, self.name)).answers


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


def chat(tokenizer: PreTrainedTokenizerBase) -> Render:
    """Renders a question as the user's turn of the tokenizer's chat template, and the opening as the assistant's.

    Where the template takes no assistant's turn to be continued, the opening follows the words that begin one.
    """

    def render(question: str, prefix: str) -> str:
        turns = [{"role": "user", "content": question}]
        opened = [*turns, {"role": "assistant", "content": prefix}]
        with contextlib.suppress(ValueError, TemplateError):
            return str(tokenizer.apply_chat_template(opened, tokenize=False, continue_final_message=True))
        return f"{tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)}{prefix}"

    return render


def counter(tokenizer: PreTrainedTokenizerBase, add_bos_token: bool | None = None) -> Count:
    """Counts tokens as lm-eval's Hugging Face models read a text; arguments as of ``tokens_of``."""
    return lambda text: len(tokens_of(tokenizer, text, add_bos_token))


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, add_bos_token: bool | None = None) -> list[int]:
    """The tokens of a text with special ones once, template or not; None leaves to the tokenizer whether any."""
    bos = getattr(tokenizer, "bos_token", None)
    add = False if bos and text.startswith(bos) else add_bos_token
    options = {} if add is None else {"add_special_tokens": add}
    return list(tokenizer(text, return_attention_mask=False, verbose=False, **options)["input_ids"])


def fill(tokens_at: Callable[[int], int], room: int, most: int | None = None) -> int:
    """How many units of filler fit, ``most`` or fewer: the largest number found whose text has at most ``room`` tokens.

    ``tokens_at`` gives the tokens of the whole text with that many units; it grows but for a few tokens, almost in
    proportion, so that secants land within a few steps. The search stops when at most 0.2 % of the room, or no whole
    unit, is left. Raises EvalError where not even the text without filler fits.
    """
    low, low_tokens = 0, tokens_at(0)
    if low_tokens > room:
        raise EvalError(f"the text needs {low_tokens} tokens without any filler, and {room} are free; ask for more")
    high = None if most is None else most + 1  # known, or taken, not to fit
    guess = _PROBE
    while high is None or high - low > 1:
        guess = max(low + 1, guess if high is None else min(guess, high - 1))
        tokens = tokens_at(guess)
        size = (tokens - low_tokens) / (guess - low)  # tokens of one unit
        if tokens <= room:
            low, low_tokens = guess, tokens
            if room - low_tokens <= _CLOSE_ENOUGH * room:
                break
        else:
            high = guess
        guess = low + int((room * (1 - _CLOSE_ENOUGH / 2) - low_tokens) / size) if size > 0 else 2 * guess
    return low

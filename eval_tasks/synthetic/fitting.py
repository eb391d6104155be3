"""Filling a context to a given number of tokens, with a handful of tokenisations whatever the length."""

import contextlib
from collections.abc import Callable

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from eval_tasks.errors import EvalError

Render = Callable[[str, str], str]  # from a question and the words that open its answer to what the model reads
Count = Callable[[str], int]  # from a text to its number of tokens, those included that the tokenizer adds
TOLERANCE = 0.02  # share of the length that may stay empty
_CLOSE_ENOUGH = 0.002  # share of the room at which the search ends early
_PROBE = 32  # units of filler from which their size is first estimated


def chat(tokenizer: PreTrainedTokenizerBase) -> Render:
    """Renders a question as the user's turn of the tokenizer's chat template, and the opening as the assistant's.

    Where the template takes no assistant's turn to be continued, the opening follows the words that begin one. Raises
    EvalError where there is no template, or one that does not take a question.
    """
    if not tokenizer.chat_template:
        raise EvalError("the tokenizer has no chat template: measure without one, or give a tokenizer that has one")

    def render(question: str, prefix: str) -> str:
        turns = [{"role": "user", "content": question}]
        opened = [*turns, {"role": "assistant", "content": prefix}]
        with contextlib.suppress(ValueError, TemplateError):
            return str(tokenizer.apply_chat_template(opened, tokenize=False, continue_final_message=True))
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (ValueError, TemplateError) as error:
            raise EvalError(
                f"the tokenizer's chat template does not take a user's question ({error}): measure without one, or "
                "give a tokenizer whose template does"
            ) from error
        return f"{text}{prefix}"

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

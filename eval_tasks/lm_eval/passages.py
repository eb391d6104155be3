"""Passages of a text cut for lm-eval, which takes strings: one scored end under left contexts of several lengths.

Cuts fall before whitespace, where a tokenizer yields the same tokens for the parts as for the whole; lengths are
therefore reached from below, within a few tokens.
"""

import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from eval_tasks.errors import EvalError

Encode = Callable[[str], list[int]]
_LEAST_FILL = 0.9


@dataclass(frozen=True)
class Passage:
    """One scored end of a text and its left contexts.

    Attributes:
        contexts: one left context per length, shortest first, each the end of the next.
        continuation: the text that is scored, the same after every context.
        context_tokens: tokens of each context and the continuation together, special ones included.
        scored_tokens: tokens of the continuation after each context.
    """

    contexts: tuple[str, ...]
    continuation: str
    context_tokens: tuple[int, ...]
    scored_tokens: tuple[int, ...]


def cut_passages(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    scored_tokens: int,
    count: int,
    encode: Encode,
) -> list[Passage]:
    """Cuts up to ``count`` passages whose ends are spread over the text, in a fixed shuffled order.

    Args:
        text: the text; at least as long as the longest length.
        tokenizer: a tokenizer that reports character offsets.
        lengths: context lengths in tokens, ascending, each with the scored tokens and the special tokens included.
        scored_tokens: tokens to score at the end of each context.
        count: number of passages; fewer where the longest contexts would overlap.
        encode: how the model under test will encode a string.

    Raises:
        EvalError: the text is too short, or has too few word borders to cut at.
    """
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError as error:
        raise EvalError(
            f"{type(tokenizer).__name__} reports no character offsets: give a fast tokenizer, as tokenizer=... in"
            " --metadata"
        ) from error
    starts = [start for start, _ in encoded["offset_mapping"]]
    borders = [0, *(match.start() for match in re.finditer(r"\s+(?=\S)", text) if match.start()), len(text)]
    special = len(encode("a")) - len(tokenizer("a", add_special_tokens=False)["input_ids"])
    longest = lengths[-1] - special
    if len(starts) < longest:
        raise EvalError(f"the text has {len(starts)} tokens, the longest length is {lengths[-1]}")
    count = min(count, len(starts) // longest)
    step = (len(starts) - longest) / max(1, count - 1)
    ends = [longest + round(i * step) for i in range(count)]
    cutter = _Cutter(text, [*starts, len(text)], borders, encode, special)
    passages = [cutter.passage(end, lengths, scored_tokens) for end in ends]
    # The first N passages, which is what --limit takes, should not all come from the beginning of the text.
    random.Random(0).shuffle(passages)
    return passages


@dataclass(frozen=True)
class _Cutter:
    text: str
    starts: list[int]  # character at which each token begins, and the text's length
    borders: list[int]  # characters before which a cut may fall, the text's ends included
    encode: Encode
    special: int

    def passage(self, end_token: int, lengths: Sequence[int], scored_tokens: int) -> Passage:
        """The passage that ends at the last border before token ``end_token``."""
        end = self.borders[bisect_right(self.borders, self.starts[end_token]) - 1]
        last = bisect_left(self.starts, end)
        cut = self._border_from(last, scored_tokens)
        continuation = self.text[cut:end]
        contexts, totals, scored = [], [], []
        for length in lengths:
            begin = self._border_from(last, length - self.special)
            total = len(self.encode(self.text[begin:end]))
            # Cut off from what stood before it, the first word can take more tokens than it did in place.
            while total > length:
                begin = self.borders[bisect_right(self.borders, begin)]
                total = len(self.encode(self.text[begin:end]))
            context = self.text[begin:cut]
            contexts.append(context)
            totals.append(total)
            scored.append(total - len(self.encode(context)))
            if total < _LEAST_FILL * length or scored[-1] < _LEAST_FILL * scored_tokens:
                raise EvalError(
                    f"the text has too few spaces near character {end} to cut {scored_tokens} tokens after a context of"
                    f" {length}: got {scored[-1]} and {total}; give a text with words, or larger lengths"
                )
        return Passage(tuple(contexts), continuation, tuple(totals), tuple(scored))

    def _border_from(self, last: int, tokens: int) -> int:
        """The first border with at most ``tokens`` tokens from there to token ``last``."""
        return self.borders[bisect_left(self.borders, self.starts[max(0, last - tokens)])]

"""Passages of a text cut for lm-eval, which takes strings: one scored end under left contexts of several lengths.

They lie where the harness's own task ``perplexity`` puts its samples. Cuts fall before whitespace, where a tokenizer
yields the same tokens for the parts as for the whole, so lengths are reached from below, within a few tokens.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval_tasks.errors import EvalError
from eval_tasks.tasks import Layout, TokenisedText, places

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Passage:
    """One scored end of a text and its left contexts.

    Attributes:
        contexts: one left context per length, shortest first, each the end of the next.
        continuation: the text that is scored, the same after every context.
        context_tokens: tokens that the model reads at each length, those it puts before a text included.
        scored_tokens: tokens of the continuation after each context.
    """

    contexts: tuple[str, ...]
    continuation: str
    context_tokens: tuple[int, ...]
    scored_tokens: tuple[int, ...]


def cut_passages(content: str, text: TokenisedText, layout: Layout, encode: Encode) -> list[Passage]:
    """Cuts ``layout.samples`` passages; fewer are the first of more.

    Args:
        content: the text.
        text: its tokens.
        layout: lengths (tokens read), number of samples, tokens scored, and the seed.
        encode: how the model under test will encode a string.

    Raises:
        EvalError: the text is too short, or has too few spaces to cut at.
    """
    cutter = _Cutter(content, text, encode)
    stretch = max(layout.lengths) + 1
    return [cutter.passage(place + stretch, layout) for place in places(text, layout)]


class _Cutter:
    def __init__(self, content: str, text: TokenisedText, encode: Encode) -> None:
        self.content = content.encode("utf-8")
        self.token_starts = [0, *text.byte_ends.tolist()]
        # Bytes before which a cut may fall: runs of whitespace, and the text's ends.
        inner = (match.start() for match in re.finditer(rb"\s+(?=\S)", self.content) if match.start())
        self.borders = [0, *inner, len(self.content)]
        self.prefix = len(text.prefix)
        self.encode = encode

    def passage(self, end_token: int, layout: Layout) -> Passage:
        """The passage that ends at the last border before token ``end_token``."""
        end = self.borders[bisect_right(self.borders, self.token_starts[end_token]) - 1]
        last = bisect_left(self.token_starts, end)
        cut = self._border_from(last - layout.scored)
        contexts, read, scored = [], [], []
        for length in layout.lengths:
            begin = self._border_from(last - length - 1 + self.prefix)
            total = len(self.encode(self._part(begin, end)))
            # Cut off from what stood before it, the first word can take more tokens than it did in place.
            while total > length + 1 and begin < cut:
                begin = self.borders[bisect_right(self.borders, begin)]
                total = len(self.encode(self._part(begin, end)))
            contexts.append(self._part(begin, cut))
            # The last token is predicted and not read.
            read.append(total - 1)
            scored.append(total - len(self.encode(contexts[-1])))
            if not _fills(read[-1], length) or not _fills(scored[-1], layout.scored):
                raise EvalError(
                    f"the text has too few spaces near byte {end} to score {layout.scored} tokens under a context of"
                    f" {length}: got {scored[-1]} and {read[-1]}; give a text with words, or larger lengths"
                )
        return Passage(tuple(contexts), self._part(cut, end), tuple(read), tuple(scored))

    def _border_from(self, token: int) -> int:
        """The first border at or after the start of a token."""
        return self.borders[bisect_left(self.borders, self.token_starts[max(0, token)])]

    def _part(self, begin: int, end: int) -> str:
        return self.content[begin:end].decode("utf-8")


def _fills(tokens: int, wanted: int) -> bool:
    """Whether a cut at a word border came within a tenth, or a long word, of what was wanted."""
    return wanted - max(8, wanted // 10) <= tokens <= wanted

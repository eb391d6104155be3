"""Texts cut for lm-eval, which takes strings: before whitespace, where parts have the same tokens as the whole."""

import re

from transformers import PreTrainedTokenizerBase

from eval_tasks.tasks import tokenise


class WordText:
    """A text, its tokens, and where it may be cut.

    Attributes:
        tokens: of the whole text.
        starts: the byte at which each token begins, and the text's end.
        borders: the bytes at which a cut may fall, ascending: the starts of whitespace, and the text's ends.
    """

    def __init__(self, content: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._content = content.encode("utf-8")
        self.tokens = tokenise(tokenizer, content)
        self.starts = [0, *self.tokens.byte_ends.tolist()]
        inner = (match.start() for match in re.finditer(rb"\s+(?=\S)", self._content) if match.start())
        self.borders = [0, *inner, len(self._content)]

    def part(self, begin: int, end: int) -> str:
        """The text from one byte to another, which are borders."""
        return self._content[begin:end].decode("utf-8")

"""A tiny model with a word-level tokenizer in a directory, and a text for it: what a sweep needs, without a network."""

import random
from pathlib import Path

from tiny_models import VOCABULARY, tiny_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{number:02d}" for number in range(3, VOCABULARY)]


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per word of ``WORDS``; with ``bos``, a BOS token is put before every text."""
    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2} | {word: index + 3 for index, word in enumerate(WORDS)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", pad_token="<pad>")


def tiny_text(words: int, seed: int = 0) -> str:
    """So many random words, separated by blanks."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def tiny_files(directory: Path, family: str = "llama") -> list[str]:
    """``--model`` and ``--text``: a tiny model and a text of 2,000 words, made where they are missing."""
    model, text = directory / "model", directory / "text.txt"
    if not model.exists():
        tiny_model(family).save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
        text.write_text(tiny_text(2000), encoding="utf-8")
    return ["--model", str(model), "--text", str(text)]


def sweep_arguments(directory: Path, out: Path, *further: str) -> list[str]:
    """Arguments of ``nc-patch`` for a sweep of a second or two of ``tiny_files``; of an option the last counts."""
    sizes = "--lengths 48 96 --samples 2 --scored 16 --passage 12 --equal-at 48 --alpha 2 --device cpu"
    return ["eval", *tiny_files(directory), "--out", str(out), *sizes.split(), *further]

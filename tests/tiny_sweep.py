"""Tokenizers, texts and a tiny model in a directory: what a sweep needs, without a network."""

import random
from functools import cache
from pathlib import Path

from tiny_models import VOCABULARY, tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from eval_tasks.synthetic.words import english_words
from eval_tasks.texts import python_reference

WORDS = [f"w{number:02d}" for number in range(3, VOCABULARY)]
KINDS = ("byte_bpe", "bpe_with_bos", "unigram_chat")
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}"
    "{% if not loop.last %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}</s>[assistant] {% endif %}"
)


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per word of ``WORDS``; with ``bos``, a BOS token is put before every text."""
    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2} | {word: index + 3 for index, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", pad_token="<pad>")


@cache
def tokenizer_of_kind(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one of ``KINDS``: of bytes, of marked words and with a BOS token, or with a chat template."""
    corpus = [python_reference()[0][:200_000], " ".join(english_words())]
    shared = {"special_tokens": ["<s>", "</s>", "<unk>"], "show_progress": False}
    trainer: trainers.Trainer = trainers.BpeTrainer(vocab_size=6000, **shared)
    if kind == "byte_bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "bpe_with_bos":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=4000, unk_token="<unk>", **shared)
        corpus[0] = corpus[0][:60_000]
    random.Random(0).shuffle(corpus)
    tokenizer.train_from_iterator(corpus, trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if kind == "unigram_chat":
        found.chat_template = CHAT_TEMPLATE
    return found


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

"""Three kinds of tokenizer, trained in a second on a part of the Python reference."""

import random
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from eval_tasks.synthetic.words import english_words
from eval_tasks.texts import python_reference

KINDS = ("byte_bpe", "bpe_with_bos", "unigram_chat")
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}"
    "{% if not loop.last %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}</s>[assistant] {% endif %}"
)


@cache
def tokenizer_of_kind(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer: byte-level BPE, BPE over marked words with a BOS token, or Unigram with a chat template."""
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

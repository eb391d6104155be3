"""A tiny random Llama with its tokenizer and a text, and ``nc_perplexity`` run on them."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lm_eval_case import LENGTHS, LONG_POSITIONS, POSITIONS, SCORED, TASKS_DIRECTORY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 4,000 words, some of them of several tokens."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 7))) for _ in range(200)]
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(draw.choices(words, k=4000)) + "\n")
    return file


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A Llama of two layers with random weights, large enough that attention is uneven, and its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(text)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=400,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture
def evaluate(text: Path, model_dir: Path) -> Callable[..., dict[str, Any]]:
    """``evaluate(model, **model_args)``: runs ``nc_perplexity`` through ``simple_evaluate`` and returns its results."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import eval_tasks.lm_eval  # noqa: F401 - registers nc_hf

    def run(
        model: str,
        *,
        lengths: list[int] = LENGTHS,
        options: dict[str, Any] | None = None,
        text: Path = text,
        **model_args: Any,
    ) -> Any:
        arguments = {"pretrained": str(model_dir), "dtype": "float32", **model_args}
        metadata = {**arguments, "lengths": lengths, "scored": SCORED, "samples": 4, "text": str(text)}
        manager = TaskManager(include_path=str(TASKS_DIRECTORY), include_defaults=False, metadata=metadata)
        options = {"batch_size": 1, "device": "cpu", "bootstrap_iters": 0, **(options or {})}
        return simple_evaluate(
            model=model, model_args=arguments, tasks=["nc_perplexity"], task_manager=manager, **options
        )

    return run


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the model's forward calls, one entry per call."""
    calls: list[int] = []
    forward = transformers.LlamaForCausalLM.forward

    def counted(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(input_ids.shape[0])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", counted)
    return calls


@pytest.fixture(scope="session")
def long_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one small layer with random weights and 1,100 positions, and a tokenizer with a chat template."""
    from synthetic_tokenizers import CHAT_TEMPLATE, tokenizer_of_kind

    directory = tmp_path_factory.mktemp("long_model")
    tokenizer_of_kind("byte_bpe").save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=6000,
        max_position_embeddings=LONG_POSITIONS,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture
def run_tasks(long_model_dir: Path) -> Callable[..., dict[str, Any]]:
    """``run_tasks(names, model, metadata, **options)``: runs tasks through ``simple_evaluate``, returns its results."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import eval_tasks.lm_eval  # noqa: F401 - registers nc_hf

    def run(
        names: list[str], model: str = "hf", metadata: dict[str, Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        arguments = {"pretrained": str(long_model_dir), "dtype": "float32", **options.pop("model_args", {})}
        manager = TaskManager(
            include_path=[str(TASKS_DIRECTORY), *options.pop("more_tasks", [])],
            include_defaults=False,
            metadata={**arguments, **(metadata or {})},
        )
        options = {"batch_size": 1, "device": "cpu", "bootstrap_iters": 0, **options}
        results: dict[str, Any] = simple_evaluate(
            model=model, model_args=arguments, tasks=names, task_manager=manager, **options
        )
        return results

    return run


@pytest.fixture
def our_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs ``main`` on arguments, without lm-eval's own thousands of tasks, whose index takes seconds."""
    from lm_eval.tasks import TaskManager

    from eval_tasks.lm_eval import __main__ as command

    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: TaskManager(include_defaults=False, **options))

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
        command.main()

    return run

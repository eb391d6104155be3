"""Two tiny random Llamas with their tokenizers, and the tasks run on them."""

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
    """A Llama of two layers with weights large enough that attention is uneven, and a tokenizer of the text."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    options = {"vocab_size": 400, "special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train([str(text)], trainers.BpeTrainer(**options))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    save_llama(directory, hidden=64, layers=2, heads=4, vocab_size=400, positions=POSITIONS)
    return directory


@pytest.fixture(scope="session")
def long_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one small layer with 1,100 positions, and a tokenizer with a chat template."""
    from synthetic_tokenizers import CHAT_TEMPLATE, tokenizer_of_kind

    directory = tmp_path_factory.mktemp("long_model")
    tokenizer_of_kind("byte_bpe").save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    save_llama(directory, hidden=32, layers=1, heads=2, vocab_size=6000, positions=LONG_POSITIONS)
    return directory


def save_llama(directory: Path, hidden: int, layers: int, heads: int, vocab_size: int, positions: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": layers, "vocab_size": vocab_size}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "max_position_embeddings": positions}
    config = LlamaConfig(**sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


@pytest.fixture
def run_tasks(long_model_dir: Path) -> Callable[..., dict[str, Any]]:
    """``run_tasks(names, model, metadata, **options)``: runs tasks through ``simple_evaluate``, returns its results."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import eval_tasks.lm_eval  # noqa: F401 - registers nc_hf

    def run(names: list[str], model: str = "hf", metadata: dict[str, Any] | None = None, **options: Any) -> Any:
        arguments = {"pretrained": str(long_model_dir), "dtype": "float32", **options.pop("model_args", {})}
        paths = [str(TASKS_DIRECTORY), *options.pop("more_tasks", [])]
        given = {**arguments, **(metadata or {})}
        manager = TaskManager(include_path=paths, include_defaults=False, metadata=given)
        options = {"batch_size": 1, "device": "cpu", "bootstrap_iters": 0, **options}
        return simple_evaluate(model=model, model_args=arguments, tasks=names, task_manager=manager, **options)

    return run


@pytest.fixture
def evaluate(text: Path, model_dir: Path, run_tasks: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """``evaluate(model, **model_args)``: the results of ``nc_perplexity`` on the model of two layers."""

    def run(model: str, lengths: list[int] = LENGTHS, text: Path = text, **given: Any) -> Any:
        options = given.pop("options", {})
        metadata = {"lengths": lengths, "scored": SCORED, "samples": 4, "text": str(text)}
        return run_tasks(
            ["nc_perplexity"], model, metadata, model_args={"pretrained": str(model_dir), **given}, **options
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


@pytest.fixture
def our_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs ``main`` on arguments, of lm-eval's thousands of tasks with those of ``suites`` alone, to save seconds."""
    from lm_eval.tasks import TaskManager

    from eval_tasks.lm_eval import __main__ as command

    def run(*arguments: str, suites: tuple[str, ...] = ()) -> None:
        def manager(include_path: list[str], **options: Any) -> TaskManager:
            return TaskManager(include_path=[*suites, *include_path], include_defaults=False, **options)

        monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
        command.main()

    return run

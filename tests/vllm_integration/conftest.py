"""Every test of this directory needs vLLM, in an environment of its own: scripts/setup_vllm.sh."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ways import generated_alone

from eval_tasks.errors import EvalError
from eval_tasks.smollm2 import smollm2_directory
from nc_patch import patched

ROOT = Path(__file__).parents[2]
TOKENS = 24


@pytest.fixture(scope="session")
def model() -> str:
    """The directory of SmolLM2."""
    try:
        return str(smollm2_directory())
    except EvalError as error:
        pytest.skip(f"SmolLM2 is not here: {error}")


@pytest.fixture(scope="session")
def tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="session")
def prompts(tokenizer: Any) -> list[list[int]]:
    """Six, of 5 to about 700 tokens."""
    text = (ROOT / "LICENSE").read_text()
    texts = (
        "The capital of France is",
        "Once upon a time there was a little girl who",
        text[:3000] + "\n\nIn short, this license says that",
        "def fibonacci(n):\n",
        text[:1600] + "\n\nThe history of the software is that it",
        text[4000:7600] + "\n\nQuestion: what is this text about?\nAnswer:",
    )
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.fixture(scope="session")
def reference(model: str) -> Callable[..., dict[str, Any]]:
    """What transformers generates for each prompt alone, patched with the settings, if any; remembered."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    known: dict[str, dict[str, Any]] = {}

    def run(prompts: list[list[int]], settings: dict[str, Any] | None, tokens: int = TOKENS) -> dict[str, Any]:
        name = json.dumps([settings, tokens, prompts])
        if name not in known:
            with nullcontext() if settings is None else patched(loaded, **settings):
                known[name] = generated_alone(loaded, prompts, tokens)
        return known[name]

    return run


@pytest.fixture
def engine(model: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs vLLM in a process of its own on prompts; see ``engine.py`` for what it takes and returns."""

    def run(prompts: list[list[int]], options: dict[str, Any], **job: Any) -> dict[str, Any]:
        files = [str(tmp_path / name) for name in ("job.json", "result.json")]
        Path(files[0]).write_text(json.dumps({"model": model, "prompts": prompts, "options": options, **job}))
        command = [sys.executable, str(Path(__file__).with_name("engine.py")), *files]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads(Path(files[1]).read_text())

    return run

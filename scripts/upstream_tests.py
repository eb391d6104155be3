"""Runs transformers' own model tests with every model patched at a full budget, and holds them to a run without.

    python scripts/upstream_tests.py TRANSFORMERS [--models llama mistral qwen3 gemma3] [--out FILE]

TRANSFORMERS is a checkout of transformers, of the version that is installed, with its ``tests/`` and ``conftest.py``.
It needs ``parameterized`` and ``httpx`` beside this package. A test that passes plain must pass patched, unless
``EXCEPTIONS`` names it with the reason. Exits with 1 where one does not, or where no patched model ran.

This file is also the pytest plugin of these runs, which patches a model at the outermost call of ``forward`` or
``generate``. Tests that compare eager attention with SDPA keep their eager models; elsewhere the suite's own switch
``has_attentions`` says that there are no attention weights. Padding of a mask for ``generate`` moves to the left.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nc_patch import UnsupportedModelError, is_patched, patch_model
from nc_patch.layers import IMPLEMENTATION

# Every key, by way of the top-k operation.
FULL = {"alpha": 1e6, "C": 0.0, "selection": "topk", "dense_below": 0}
# What is not run, as pytest's -k takes it: images, whose blocks see both ways.
SELECT = {"gemma3": "not Vision2Text"}
# Why tests cannot pass patched, and patterns of these. What they ask for is refused by name.
EXCEPTIONS = {
    "attention weights": ("test_capture_outputs_decorator", "test_eager_matches_sdpa_inference_*_output_attentions"),
    "a mask with holes": ("test_question_answering_model", "test_*_classification_model*"),
    "a mask with holes, where a random id is the padding id": ("test_generate_from_random_inputs_embeds",),
    "a custom 4-D mask": ("test_custom_4d_attention_mask",),
}
_COMPARES_WITH_EAGER = "eager_matches"
_patched: Counter[str] = Counter()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a checkout of transformers")
    parser.add_argument("--models", nargs="+", default=["llama", "mistral", "qwen3", "gemma3"])
    parser.add_argument("--work", type=Path, default=Path("upstream_runs"), help="where records and logs go")
    parser.add_argument("--out", type=Path, help="a JSON file for the counts")
    arguments = parser.parse_args()
    if not (arguments.directory / "tests" / "test_modeling_common.py").exists():
        parser.error(f"{arguments.directory} has no tests/test_modeling_common.py: give a checkout of transformers")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__, "models": {}}
    fine = True
    for model in arguments.models:
        plain, patched = (run(arguments.directory, model, work, way) for way in ("plain", "patched"))
        # A test that fails where it was skipped, or is skipped where it passed, ends worse.
        rank = ["passed", "skipped", "failed"].index
        before = {name: record["outcome"] for name, record in plain.items()}
        worse = [r for name, r in patched.items() if rank(r["outcome"]) > rank(before.get(name, "passed"))]
        for record in worse:
            name, skipped = record["test"].split("::")[-1], record["outcome"] == "skipped"
            reasons = [why for why, patterns in EXCEPTIONS.items() if any(fnmatch(name, each) for each in patterns)]
            record["reason"] = "attention weights" if skipped else next(iter(reasons), None)
        through = sum(r["outcome"] == "passed" and bool(r["patched"]) for r in patched.values())
        counts = [dict(Counter(r["outcome"] for r in each.values())) for each in (plain, patched)]
        results["models"][model] = {"plain": counts[0], "patched": counts[1], "through": through, "worse": worse}
        print(f"{model}: plain {counts[0]}, patched {counts[1]}, {through} passed through a patched model", flush=True)
        unexplained = [record for record in worse if record["reason"] is None]
        for record in unexplained:
            print(f"  unexplained: {record['test']}: {record['said']}", flush=True)
        fine &= through > 0 and not unexplained
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if fine else 1


def run(directory: Path, model: str, work: Path, way: str) -> dict[str, dict[str, Any]]:
    """The record of each of a model's tests; a test whose subtests differ ended as the worst of them."""
    record, log = work / f"{model}_{way}.jsonl", work / f"{model}_{way}.log"
    record.unlink(missing_ok=True)
    here = Path(__file__).resolve()
    environment = dict(os.environ, NC_UPSTREAM_RECORD=str(record), NC_UPSTREAM_WAY=way, HF_HUB_OFFLINE="1")
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (here.parent.parent, here.parent, *sys.path[1:])))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", here.stem]
    command += [f"tests/models/{model}/test_modeling_{model}.py", *(["-k", SELECT[model]] if model in SELECT else [])]
    with log.open("w", encoding="utf-8") as output:
        subprocess.run(command, cwd=directory, env=environment, stdout=output, stderr=output, timeout=3600)
    if not record.exists():
        raise SystemExit(f"no test of {model} ran ({way}): see {log}")
    records = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    return {each["test"]: each for each in sorted(records, key=lambda each: each["outcome"] == "failed")}


def _patch(module: torch.nn.Module, _: Any = None) -> None:
    """Patches a model that is about to run, unless that is done; what cannot be patched runs as it is."""
    if not isinstance(module, transformers.PreTrainedModel) or torch.compiler.is_compiling():
        return
    implementation = module.config.get_text_config(decoder=True)._attn_implementation
    keeps_eager = _COMPARES_WITH_EAGER in os.environ["PYTEST_CURRENT_TEST"] and implementation == "eager"
    if not keeps_eager and not (is_patched(module) and implementation == IMPLEMENTATION):
        with suppress(UnsupportedModelError):
            patch_model(module, **FULL)
            _patched[type(module).__name__] += 1


def pytest_configure(config: pytest.Config) -> None:
    """Gets between the tests and ``forward`` and ``generate`` of every model."""
    patching = os.environ["NC_UPSTREAM_WAY"] == "patched"
    if patching:
        torch.nn.modules.module.register_module_forward_pre_hook(_patch)
    generate = transformers.GenerationMixin.generate

    @functools.wraps(generate)
    def prepared_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            kwargs["attention_mask"] = mask.sort(-1).values  # padding to the left
        if patching:
            _patch(self)
        return generate(self, *args, **kwargs)

    transformers.GenerationMixin.generate = prepared_generate


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Says that a patched model has no attention weights, where a test would look at them."""
    _patched.clear()
    case = getattr(item, "cls", None)
    if os.environ["NC_UPSTREAM_WAY"] == "patched" and hasattr(case, "has_attentions"):
        case.has_attentions = _COMPARES_WITH_EAGER in item.name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Writes down how a test ended, and which models it patched."""
    report = yield
    if report.when == "call" or not report.passed:
        said = str(call.excinfo.value).strip()[:300] if call.excinfo else ""
        record = {"test": item.nodeid.split("tests/", 1)[-1], "outcome": report.outcome, "said": said}
        with open(os.environ["NC_UPSTREAM_RECORD"], "a", encoding="utf-8") as file:
            file.write(json.dumps(record | {"patched": dict(_patched)}) + "\n")
    return report


if __name__ == "__main__":
    sys.exit(main())

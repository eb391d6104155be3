"""Runs transformers' own model tests with every model patched at a full budget, and holds them to a run without.

    python scripts/upstream_tests.py TRANSFORMERS [--models llama mistral qwen3 gemma3] [--out FILE]

TRANSFORMERS is a checkout of transformers, of the version that is installed, with its ``tests/`` and ``conftest.py``.
It needs ``parameterized`` and ``httpx`` beside this package. Each model's file runs once plain, once with the dense
law (alpha = 1, C = 1) and once with a budget of every key by way of the top-k operation. A test that passes plain must
pass patched, unless ``EXCEPTIONS`` names it with the reason. Exits with 1 where one does not, or where nothing ran.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

MODES: dict[str, dict[str, float] | None] = {
    "plain": None,
    "dense law": {"alpha": 1.0, "C": 1.0},
    "top-k of every key": {"alpha": 1e6, "C": 0.0, "selection": "topk", "dense_below": 0},
}

# What is not run, as pytest's -k takes it: images, whose blocks see both ways, so that the model refuses them by name.
SELECT: dict[str, str] = {"gemma3": "not Vision2Text"}

# Patterns of tests that cannot pass patched, and why.
_WEIGHTS = "asks for attention weights, which sparse attention never forms: refused by name"
_HOLES = "draws a padding mask with holes, where a query does not see one run of keys: refused by name"
EXCEPTIONS: dict[str, str] = {
    "*::test_capture_outputs_decorator": _WEIGHTS,
    "*::test_eager_matches_sdpa_inference_*_output_attentions": _WEIGHTS,
    "*::test_question_answering_model": _HOLES,
    "*::test_sequence_classification_model*": _HOLES,
    "*::test_token_classification_model": _HOLES,
    "*::test_generate_from_random_inputs_embeds": "hands over random ids and no mask: generate takes an id that is the "
    "padding id for padding, which makes a mask with holes: refused by name",
    "*::test_custom_4d_attention_mask": "hands over a custom 4-D mask: refused by name",
}


def run(directory: Path, model: str, mode: str, record: Path, timeout: int, keep: bool) -> list[dict[str, Any]]:
    """The records of one model's tests in one mode, as ``upstream_plugin`` writes them, one for each test."""
    if keep and record.exists():
        return read(record)
    record.unlink(missing_ok=True)
    here = Path(__file__).resolve().parent
    environment = dict(os.environ, NC_UPSTREAM_RECORD=str(record), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    settings = MODES[mode]
    environment.pop("NC_UPSTREAM_CONFIG", None)
    if settings is not None:
        environment["NC_UPSTREAM_CONFIG"] = json.dumps(settings)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "upstream_plugin"]
    command += [f"tests/models/{model}/test_modeling_{model}.py"]
    if model in SELECT:
        command += ["-k", SELECT[model]]
    log = record.with_suffix(".log")
    with log.open("w", encoding="utf-8") as output:
        subprocess.run(command, cwd=directory, env=environment, stdout=output, stderr=output, timeout=timeout)
    if not record.exists():
        raise SystemExit(f"no test of {model} ran ({mode}): see {log}")
    return read(record)


def read(record: Path) -> list[dict[str, Any]]:
    """One record for each test: a test whose subtests differ ended as the worst of them."""
    worst: dict[str, dict[str, Any]] = {}
    for line in record.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        before = worst.get(entry["test"])
        if before is None or before["outcome"] != "failed":
            worst[entry["test"]] = entry
    return list(worst.values())


def reason_of(record: dict[str, Any]) -> str | None:
    """Why a test that passes plain need not pass patched, or None."""
    if record["outcome"] == "skipped":
        return "looks at attention weights: the suite skips it for models that have none"
    return next((reason for pattern, reason in EXCEPTIONS.items() if fnmatch(record["test"], pattern)), None)


def compare(plain: list[dict[str, Any]], patched: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of a patched run, and the tests that end worse than plain: that do not pass, or fail where plain skips."""
    rank = {"passed": 0, "skipped": 1, "failed": 2}
    before = {record["test"]: record["outcome"] for record in plain}
    lost = [r for r in patched if rank[r["outcome"]] > rank[before.get(r["test"], "passed")]]
    ran = [r for r in patched if r["outcome"] == "passed" and r["patched"]]
    models: Counter[str] = sum((Counter(r["patched"]) for r in patched), Counter())
    refused = sorted({said for r in patched for said in r["refused"]})
    told = [{"test": r["test"], "outcome": r["outcome"], "said": r["said"], "reason": reason_of(r)} for r in lost]
    return {
        **Counter(r["outcome"] for r in patched),
        "passed through a patched model": len(ran),
        "patched models": dict(sorted(models.items())),
        "not patched": refused,
        "exceptions": [each for each in told if each["reason"] is not None],
        "unexplained": [each for each in told if each["reason"] is None],
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a checkout of transformers")
    parser.add_argument("--models", nargs="+", default=["llama", "mistral", "qwen3", "gemma3"])
    parser.add_argument(
        "--modes", nargs="+", choices=[mode for mode in MODES if mode != "plain"], default=list(MODES)[1:]
    )
    parser.add_argument("--work", type=Path, default=Path("upstream_runs"), help="where records and logs go")
    parser.add_argument("--out", type=Path, help="a JSON file for the counts")
    parser.add_argument("--keep", action="store_true", help="do not run again what --work has records of")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for one file of tests")
    arguments = parser.parse_args()
    for needed in ("tests/test_modeling_common.py", "tests/generation/test_utils.py"):
        if not (arguments.directory / needed).exists():
            parser.error(f"{arguments.directory} has no {needed}: give a checkout of transformers")
    for directory in (arguments.work, *([] if arguments.out is None else [arguments.out.parent])):
        directory.mkdir(parents=True, exist_ok=True)
    work = arguments.work.resolve()
    import torch
    import transformers

    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    results: dict[str, Any] = {"versions": versions, "models": {}}
    for model in arguments.models:
        how = (arguments.timeout, arguments.keep)
        plain = run(arguments.directory, model, "plain", work / f"{model}_plain.jsonl", *how)
        result: dict[str, Any] = {"plain": dict(Counter(record["outcome"] for record in plain))}
        for mode in arguments.modes:
            record = work / f"{model}_{mode.replace(' ', '_')}.jsonl"
            result[mode] = compare(plain, run(arguments.directory, model, mode, record, *how))
            counts = {name: value for name, value in result[mode].items() if isinstance(value, int)}
            print(f"{model}, {mode}: {counts}", flush=True)
            for lost in result[mode]["unexplained"]:
                print(f"  unexplained: {lost['test']}: {lost['said']}", flush=True)
        results["models"][model] = result
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    patched_runs = [result[mode] for result in results["models"].values() for mode in arguments.modes]
    fine = all(not r["unexplained"] and r["passed through a patched model"] for r in patched_runs)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

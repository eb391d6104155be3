"""lm-eval's tasks within ``nc-patch eval``: its evaluator in process, for every method, document by document."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from eval_tasks.lm_eval import in_sweep
from eval_tasks.store import read_rows
from nc_patch.cli import main

# As lm-eval's ruler: a metric for every length, of which all but the document's own, and 4096 always, give -1.
LIKE_RULER = """
task: like_ruler
dataset_path: ""
output_type: generate_until
test_split: test
custom_dataset: !function like_ruler.documents
doc_to_text: "{{input}}"
doc_to_target: "{{outputs}}"
process_results: !function like_ruler.process_results
metric_list:
  - metric: "4096"
    aggregation: !function like_ruler.aggregate_metrics
    higher_is_better: true
generation_kwargs: {do_sample: false, max_gen_toks: 128, until: []}
"""
LIKE_RULER_CODE = """
from datasets import Dataset
from lm_eval.tasks.ruler.common_utils import aggregate_metrics, process_results

def documents(max_seq_lengths, samples, **_):
    row = {"input": "the grass is green", "outputs": [""], "max_length": max_seq_lengths[0]}
    return {"test": Dataset.from_list([row] * samples)}
"""


def arguments(model: Path, out: Path, *further: str) -> list[str]:
    settings = ["--lengths", "512", "1024", "--samples", "2", "--device", "cpu", "--answer-tokens", "4", "--alpha", "2"]
    return ["eval", "--model", str(model), "--out", str(out), *settings, *further]


def test_lm_evals_evaluator_scores_each_document_for_every_method(
    long_model_dir: Path, tmp_path: Path, run_tasks: Callable[..., dict[str, Any]]
) -> None:
    out = tmp_path / "out"
    chosen = ["--methods", "dense", "nc-topk", "--tasks", "lm-eval:nc_passkey"]
    assert main(arguments(long_model_dir, out, *chosen)) == 0
    rows = read_rows(out)
    cells = {(row["length"], row["sample"], row["method"]) for row in rows}
    assert cells == {(n, i, method) for n in (512, 1024) for i in (0, 1) for method in ("dense", "nc-topk")}
    assert {row["metric"] for row in rows} == {"string_match_512", "string_match_1024"}
    assert all(row["attended_fraction"] == 1.0 for row in rows if row["method"] == "dense")
    assert all(0 < row["attended_fraction"] < 0.5 for row in rows if row["method"] == "nc-topk")
    metadata = {"lengths": [512], "samples": 2}
    options = {"log_samples": True, "gen_kwargs": "max_gen_toks=4"}
    whole = run_tasks(["nc_passkey"], metadata=metadata, **options)["samples"]["nc_passkey"]
    said = {row["sample"]: row["said"] for row in rows if (row["length"], row["method"]) == (512, "dense")}
    assert said == {sample["doc"]["sample"]: sample["filtered_resps"][0][:400] for sample in whole}
    before = (out / "results.jsonl").read_bytes()
    assert main(arguments(long_model_dir, out, *chosen)) == 0
    assert (out / "results.jsonl").read_bytes() == before
    assert json.loads((out / "run.json").read_text())["identity"]["tasks"] == ["lm-eval:nc_passkey"]
    assert "lm-eval:nc_passkey" in (out / "report.md").read_text(encoding="utf-8")


def test_a_group_stands_for_its_members(long_model_dir: Path, tmp_path: Path) -> None:
    further = ["--methods", "dense", "--tasks", "lm-eval:nc_babi", "--samples", "1", "--lengths", "600"]
    assert main([*arguments(long_model_dir, tmp_path / "out")[:5], "--device", "cpu", *further]) == 0
    assert {row["task"] for row in read_rows(tmp_path / "out")} == {f"lm-eval:nc_babi_qa{i}" for i in range(1, 6)}


def test_tasks_with_a_metric_for_every_length_score_by_that_of_their_own(
    long_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "like_ruler.yaml").write_text(LIKE_RULER)
    (tmp_path / "like_ruler.py").write_text(LIKE_RULER_CODE)
    monkeypatch.setattr(in_sweep, "TASKS_DIRECTORY", tmp_path)
    said = []
    generate = in_sweep.HFLM.generate_until

    def watched(self: Any, requests: Any, **options: Any) -> Any:
        said.extend(request.args[1]["max_gen_toks"] for request in requests)
        return generate(self, requests, **options)

    monkeypatch.setattr(in_sweep.HFLM, "generate_until", watched)
    chosen = ["--methods", "dense", "--tasks", "lm-eval:like_ruler"]
    assert main(arguments(long_model_dir, tmp_path / "out", *chosen)) == 0
    rows = read_rows(tmp_path / "out")
    assert {(row["length"], row["sample"]) for row in rows} == {(n, i) for n in (512, 1024) for i in (0, 1)}
    assert all(row["metric"] == str(row["length"]) for row in rows)
    assert all(row["metrics"] == {row["metric"]: 1.0} and row["score"] == 1.0 for row in rows)
    assert set(said) == {4}  # --answer-tokens


@pytest.mark.parametrize(
    ("further", "message"),
    [
        pytest.param(  # indexing all of lm-eval's tasks takes some ten seconds
            ["--tasks", "lm-eval:nc_passkeys"],
            "lm-eval knows no task or group 'nc_passkeys'",
            marks=pytest.mark.wide,
        ),
        (["--tasks", "lm-eval:nc_passkey", "--phase", "decode"], "lm-eval's own evaluator knows no phases"),
        (["--tasks", "lm-eval:nc_recall"], "a sweep takes tasks with a score in [0, 1]"),
        (["--tasks", "passkeys"], "unknown task 'passkeys'; allowed are recall"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(
    long_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], further: list[str], message: str
) -> None:
    assert main(arguments(long_model_dir, tmp_path / "out", "--methods", "dense", *further)) == 2
    assert message in capsys.readouterr().err

"""The metrics for ``evaluate``: loaded from their directories without a network, right and wrong inputs."""

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("evaluate", reason="the extra eval is not installed")

import evaluate

from eval_tasks.errors import EvalError
from eval_tasks.metrics import METRICS, metric_path


def load_metric(name: str) -> Any:
    return evaluate.load(str(metric_path(name)), keep_in_memory=True)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_loads_from_its_directory_without_a_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.getaddrinfo", refused)
    metric = evaluate.load(str(metric_path(name)))
    assert isinstance(metric, evaluate.Metric)
    assert metric.inputs_description.strip().startswith("Args:")


def test_a_metric_works_from_a_copy_of_its_file_alone(tmp_path: Path) -> None:
    copy = tmp_path / "string_match.py"
    copy.write_text((metric_path("string_match") / "string_match.py").read_text())
    assert evaluate.load(str(copy)).compute(predictions=["a 7"], references=[["7"]])["string_match"] == 1.0


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(EvalError, match="no metric named 'bleu': there are perplexity_by_position, string_match"):
        metric_path("bleu")


@pytest.mark.parametrize(
    ("prediction", "references", "share", "part"),
    [
        ("The numbers are 12, 34 and 56.", ["12", "34", "56"], 1.0, 1.0),
        ("only 34", ["12", "34", "56", "78"], 0.25, 1.0),
        ("nothing of it", ["12", "34"], 0.0, 0.0),
        ("", ["12"], 0.0, 0.0),
        ("  ECHO-Lamp\x07", ["echo-lamp"], 1.0, 1.0),
        ("12\x0034", ["1234"], 0.0, 0.0),
    ],
)
def test_string_match_is_rulers(prediction: str, references: list[str], share: float, part: float) -> None:
    metric = load_metric("string_match")
    for match, expected in (("all", share), ("part", part)):
        found = metric.compute(predictions=[prediction], references=[references], match=match)
        assert found == {"string_match": expected, "scores": [expected]}


def test_string_match_takes_the_mean_over_answers() -> None:
    metric = load_metric("string_match")
    metric.add(prediction="a b", reference=["a", "c"])
    metric.add(prediction="x", reference=["x"])
    assert metric.compute() == {"string_match": 0.75, "scores": [0.5, 1.0]}


@pytest.mark.parametrize(
    ("references", "match", "message"),
    [([["a"]], "any", "match must be 'all'"), ([[]], "all", "at least one string")],
)
def test_string_match_refuses_what_it_cannot_score(references: list[list[str]], match: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_metric("string_match").compute(predictions=["a"], references=references, match=match)


def test_perplexity_by_position_is_the_mean_over_the_tokens_of_a_range() -> None:
    first = [-1.0, -2.0, -3.0, -4.0]
    second = [-5.0, -6.0]
    found = load_metric("perplexity_by_position").compute(
        predictions=[first, second], references=[[1] * 4, [1] * 2], edges=[0, 1, 3]
    )
    assert found["tokens"] == [2, 3]
    assert found["loss"] == pytest.approx([3.0, (2 + 3 + 6) / 3])
    assert found["perplexity"] == pytest.approx([math.exp(3.0), math.exp(11 / 3)])
    assert found["overall"] == pytest.approx(math.exp(17 / 5))


def test_runs_of_tokens_count_by_their_number() -> None:
    metric = load_metric("perplexity_by_position")
    single = metric.compute(predictions=[[-1.0, -2.0, -3.0, -6.0]], references=[[1, 1, 1, 1]], edges=[0, 2, 4])
    runs = metric.compute(predictions=[[-3.0, -9.0]], references=[[2, 2]], edges=[0, 2, 4])
    assert single == runs
    later = metric.compute(predictions=[[-3.0]], references=[[2]], edges=[0, 2, 4], first_position=2)
    assert later["tokens"] == [0, 2]
    assert later["perplexity"][0] is None


def test_a_run_counts_where_its_middle_lies() -> None:
    metric = load_metric("perplexity_by_position")
    found = metric.compute(predictions=[[-1.0, -2.0]], references=[[9, 10]], edges=[0, 10, 20], tolerance=1)
    assert found["tokens"] == [9, 10]
    with pytest.raises(ValueError, match="the 10 tokens from position 8 on lie across an edge"):
        metric.compute(predictions=[[-1.0, -2.0]], references=[[8, 10]], edges=[0, 10, 20], tolerance=1)


def test_ranges_double_by_default() -> None:
    found = load_metric("perplexity_by_position").compute(predictions=[[-1.0] * 9], references=[[1] * 9])
    assert found["edges"] == [0, 1, 2, 4, 8, 16]
    assert found["tokens"] == [1, 1, 2, 4, 1]


def test_a_hopeless_model_has_an_infinite_perplexity() -> None:
    found = load_metric("perplexity_by_position").compute(predictions=[[-1e4]], references=[[1]], edges=[0, 1])
    assert found["perplexity"] == [math.inf]


@pytest.mark.parametrize(
    ("values", "counts", "edges", "message"),
    [
        ([-1.0], [2], [0, 1, 2], "lie across an edge"),
        ([-1.0], [1, 1], [0, 2], "1 log-likelihoods and 2 counts"),
        ([-1.0], [0], [0, 2], "each covers at least one"),
        ([-1.0], [1], [2, 1], "ascending positions"),
        ([-1.0], [1], [0], "two or more"),
    ],
)
def test_perplexity_by_position_refuses_what_does_not_fit(
    values: list[float], counts: list[int], edges: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_metric("perplexity_by_position").compute(predictions=[values], references=[counts], edges=edges)

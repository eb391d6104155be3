"""The metrics for ``evaluate``: loaded from their directories without a network, right and wrong inputs."""

import math
from itertools import pairwise

import pytest

pytest.importorskip("evaluate", reason="the extra eval is not installed")

import evaluate

from eval_tasks.errors import EvalError
from eval_tasks.metrics import METRICS, metric_path


def compute(name, predictions, references, **options):
    metric = evaluate.load(str(metric_path(name)), keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references, **options)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_loads_from_its_directory_or_its_file_alone_without_a_network(name, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.getaddrinfo", refused)
    copy = tmp_path / f"{name}.py"
    copy.write_text((metric_path(name) / f"{name}.py").read_text())
    for path in (metric_path(name), copy):
        metric = evaluate.load(str(path))
        assert isinstance(metric, evaluate.Metric)
        assert metric.inputs_description.strip().startswith("Args:")


def test_an_unknown_metric_is_refused():
    with pytest.raises(EvalError, match="no metric named 'bleu': there are perplexity_by_position, string_match"):
        metric_path("bleu")


@pytest.mark.parametrize(
    ("prediction", "references", "share", "part"),
    [
        ("The numbers are 12, 34 and 56.", ["12", "34", "56"], 1.0, 1.0),
        ("only 34", ["12", "34", "56", "78"], 0.25, 1.0),
        ("", ["12"], 0.0, 0.0),
        ("  ECHO-Lamp\x07", ["echo-lamp"], 1.0, 1.0),
        ("12\x0034", ["1234"], 0.0, 0.0),
    ],
)
def test_string_match_is_rulers(prediction, references, share, part):
    other = ("x", ["x"])
    for match, expected in (("all", share), ("part", part)):
        found = compute("string_match", [prediction, other[0]], [references, other[1]], match=match)
        assert found == {"string_match": (expected + 1) / 2, "scores": [expected, 1.0]}


@pytest.mark.parametrize(
    ("references", "match", "message"), [([["a"]], "any", "match must be 'all'"), ([[]], "all", "at least one string")]
)
def test_string_match_refuses_what_it_cannot_score(references, match, message):
    with pytest.raises(ValueError, match=message):
        compute("string_match", ["a"], references, match=match)


def test_perplexity_by_position_is_the_mean_over_the_tokens_of_a_range():
    values = [[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0]]
    found = compute("perplexity_by_position", values, [[1] * 4, [1] * 2], edges=[0, 1, 3])
    assert found["tokens"] == [2, 3]
    assert found["loss"] == pytest.approx([3.0, (2 + 3 + 6) / 3])
    assert found["perplexity"] == pytest.approx([math.exp(3.0), math.exp(11 / 3)])
    assert found["overall"] == pytest.approx(math.exp(17 / 5))


def test_a_run_of_tokens_counts_by_their_number():
    name = "perplexity_by_position"
    single = compute(name, [[-1.0, -2.0, -3.0, -6.0]], [[1, 1, 1, 1]], edges=[0, 2, 4])
    assert compute(name, [[-3.0, -9.0]], [[2, 2]], edges=[0, 2, 4]) == single
    empty = compute(name, [[-3.0]], [[2]], edges=[0, 2, 4])
    assert (empty["tokens"], empty["perplexity"]) == ([2, 0], [pytest.approx(math.exp(1.5)), None])


@pytest.mark.parametrize(
    ("count", "edges"), [(1, [0, 1]), (2, [0, 1, 2]), (8, [0, 1, 2, 4, 8]), (9, [0, 1, 2, 4, 8, 16])]
)
def test_ranges_double_by_default(count, edges):
    found = compute("perplexity_by_position", [[-1.0] * count], [[1] * count])
    assert found["edges"] == edges
    assert found["tokens"] == [min(b, count) - a for a, b in pairwise(edges)]


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
def test_perplexity_by_position_refuses_what_does_not_fit(values, counts, edges, message):
    with pytest.raises(ValueError, match=message):
        compute("perplexity_by_position", [values], [counts], edges=edges)

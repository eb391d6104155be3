"""The metric for ``evaluate``: loaded from its directory without a network, right and wrong inputs."""

import shutil
from unittest.mock import Mock

import pytest

pytest.importorskip("evaluate", reason="the extra eval is not installed")

import evaluate

from eval_tasks.metrics import string_match


@pytest.fixture(params=["directory", "file alone"])
def metric(request, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", Mock(side_effect=AssertionError("the network was asked")))
    directory = string_match.__path__[0]
    place = directory if request.param == "directory" else shutil.copy(f"{directory}/string_match.py", tmp_path)
    return evaluate.load(place, keep_in_memory=True)


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
def test_string_match_is_rulers(metric, prediction, references, share, part):
    for match, expected in (("all", share), ("part", part)):
        found = metric.compute(predictions=[prediction, "x"], references=[references, ["x"]], match=match)
        assert found == {"string_match": (expected + 1) / 2, "scores": [expected, 1.0]}


@pytest.mark.parametrize(
    ("references", "match", "message"), [([["a"]], "any", "match must be 'all'"), ([[]], "all", "at least one string")]
)
def test_string_match_refuses_what_it_cannot_score(metric, references, match, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=["a"], references=references, match=match)

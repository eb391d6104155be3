"""``nc-patch bench``: what it measures and writes on the CPU, at sizes that say nothing about speed, and its rivals."""

import functools
import itertools
import json
from unittest import mock

import pytest
import torch

from eval_tasks.bench import measure, operator
from eval_tasks.bench.inputs import GEOMETRIES, Geometry
from nc_patch.cli import main

CPU = torch.device("cpu")
operator_attention, prepare = operator.sparse_attention, measure.prepare
TINY = Geometry(4, 2, 16)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A geometry that takes no time, and few sets of inputs."""
    monkeypatch.setitem(GEOMETRIES, "tiny", TINY)
    monkeypatch.setattr(operator, "_MOST_SETS", 2)
    monkeypatch.setattr(operator, "_FEWEST_SETS", 2)


def bench(phase, out, *further):
    arguments = ["--device", "cpu", "--geometry", "tiny", "--lengths", "64", "200", "--repeats", "2", "--alpha", "4"]
    return main(["bench", phase, *arguments, "--out", str(out), *further])


def rows_of(phase, out, method=None):
    return [row for row in json.loads((out / f"{phase}.json").read_text())["rows"] if method in (None, row["method"])]


@pytest.mark.parametrize(("phase", "form"), [("decode", "rows"), ("prefill", "expanded")])
def test_a_run_writes_every_method_of_every_case_right_and_timed(tmp_path, capsys, monkeypatch, phase, form):
    kept = {}

    def attend(*arguments, index, means, **options):
        selection = options["selection"]
        kept[selection.name] = (selection.uses_means, index and index.kind, means and means.kind)
        return operator_attention(*arguments, index=index, means=means, **options)

    monkeypatch.setattr(operator, "sparse_attention", attend)
    monkeypatch.setattr(operator, "_MATH_KEYS", 100)
    assert bench(phase, tmp_path, "--batch", "1", "2") == 0
    record = json.loads((tmp_path / f"{phase}.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert record["command"].startswith(f"nc-patch bench {phase} --device cpu")
    methods = {"topk", "block", "window", *(f"sdpa {b}, {f}" for b in ("flash", "math") for f in ("gqa", form))}
    ran = {(row["batch"], row["length"], row["method"]): row for row in record["rows"] if row["status"] == "ok"}
    plain = {method for method in methods if "math" in method}  # which is not tried on long prompts
    left_out = set(itertools.product((1, 2), (200,), plain if phase == "prefill" else ()))
    assert ran.keys() == set(itertools.product((1, 2), (64, 200), methods)) - left_out
    for row in ran.values():
        assert row["relative_error"] < 1e-3
        assert row["method"] != "window" or phase == "prefill" or row["attended"] == row["budget"]
        assert row["median_seconds"] > 0
        assert row["kind"] == "dense" or 0 < row["kept_mass"] <= 1
        assert row["kind"] == "dense" or row["backend"] == "cpu" or row["backend"].startswith("torch")
    indexes = {"topk": (True, "codes", "means"), "block": (False, "pages", None)} if phase == "decode" else {}
    assert kept == {"topk": (False, None, None), "block": (False, None, None), "window": (False, None, None)} | indexes
    said = capsys.readouterr().out
    assert "budget 4 n^0.5" in said
    assert sum(line.split()[:1] == ["tiny"] for line in said.splitlines()) == 2 * 2 * 4  # the fastest dense one alone


def spoiled(change):
    def attend(*arguments, **options):
        change(output := operator_attention(*arguments, **options))
        return output

    return attend


def replays_nothing(step, *arguments, **options):
    """``measure.prepare``, as if a CUDA graph of a selection's step had left the output as it was."""
    output = step(0) if isinstance(step, functools.partial) else step(0) * torch.nan
    return prepare(step, *arguments, **options)[0], output


SPARSE = "operator.sparse_attention"
NO_KERNEL = mock.Mock(side_effect=RuntimeError("No available kernel"))


@pytest.mark.parametrize(
    ("name", "instead", "status", "said"),
    [
        (SPARSE, spoiled(lambda _: torch.empty(1 << 55)), "out of memory", "tried to allocate"),
        (SPARSE, NO_KERNEL, "error", "No available kernel"),
        (SPARSE, spoiled(lambda o: o.mul_(1.01)), "wrong", "off by 0.01 from the PyTorch backend"),
        (SPARSE, spoiled(lambda o: o[:, :, 200].fill_(torch.nan)), "wrong", "NaN or Inf in rows that are not compared"),
        ("operator.scaled_dot_product_attention", NO_KERNEL, "absent", "No available kernel"),
        ("measure.prepare", replays_nothing, "wrong", "from the PyTorch backend, in a CUDA graph"),
    ],
)
def test_a_method_that_fails_or_is_wrong_is_recorded_and_the_others_go_on(
    tmp_path, capsys, monkeypatch, name, instead, status, said
):
    monkeypatch.setattr(f"eval_tasks.bench.{name}", instead)
    kind = "dense" if status == "absent" else "sparse"
    broken = status in ("error", "wrong")
    assert bench("prefill", tmp_path, "--lengths", "300") == broken
    for row in rows_of("prefill", tmp_path):
        assert row["status"] == (status if row["kind"] == kind else "ok")
        assert ("median_seconds" in row) == (row["kind"] != kind)
        assert row["kind"] != kind or said in row["message"]
    printed = capsys.readouterr()
    assert said in printed.out
    assert ("sparse attention failed or was wrong in 3 rows" in printed.err) == broken


def stopped_by(error):
    """``measure_all`` that ends with an error after the first case."""

    def measure_all(*arguments):
        yield next(measure.measure_all(*arguments))
        raise error

    return measure_all


@pytest.mark.parametrize(
    ("name", "instead", "ends", "statuses", "said"),
    [
        ("operator.free_bytes", lambda _: 128_000, 0, ["ok", "out of memory"], "GB of queries, keys, values"),
        ("command.measure_all", stopped_by(KeyboardInterrupt()), 1, ["ok"], "stopped: KeyboardInterrupt"),
        ("command.measure_all", stopped_by(RuntimeError("it is gone")), 1, ["ok"], "stopped: RuntimeError: it is gone"),
    ],
)
def test_a_case_that_cannot_be_measured_leaves_what_was_measured_before(
    tmp_path, capsys, monkeypatch, name, instead, ends, statuses, said
):
    monkeypatch.setattr(f"eval_tasks.bench.{name}", instead)
    assert bench("decode", tmp_path) == ends
    found = {row["length"]: row["status"] for row in rows_of("decode", tmp_path) if row["kind"] != "dense"}
    assert found == dict(zip((64, 200), statuses, strict=False))
    printed = capsys.readouterr()
    assert "budget 4 n^0.5" in printed.out
    assert said in printed.out + printed.err


def test_after_the_deadline_no_case_begins(tmp_path, capsys):
    assert bench("decode", tmp_path, "--minutes", "1e-9") == 1
    assert {row["status"] for row in rows_of("decode", tmp_path)} == {"out of time"}
    assert "nothing could be timed" in capsys.readouterr().err


@pytest.mark.parametrize(("deadline", "rounds"), [(float("inf"), 5), (0.0, 3)])
def test_methods_have_their_turns_for_three_rounds_and_then_until_the_deadline(deadline, rounds):
    order = []
    methods = {name: lambda name=name: order.append(name) for name in "ab"}
    assert [len(taken) for taken in measure.interleave(methods, 5, CPU, deadline).values()] == [rounds] * 2
    assert order == ["a", "b"] * rounds


@pytest.mark.parametrize(("option", "attends_all"), [("dense_below=300", True), ("min_mass=0.5", False)])
def test_options_reach_the_attention(tmp_path, option, attends_all):
    assert bench("prefill", tmp_path, "--lengths", "300", "--alpha", "1", "--selections", "block", "--set", option) == 0
    (row,) = rows_of("prefill", tmp_path, "block")
    assert (row["kept_mass"] == pytest.approx(1)) == attends_all

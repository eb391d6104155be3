"""``nc-patch bench``: what it measures and writes on the CPU, at sizes that say nothing about speed, and its rivals."""

import dataclasses
import json
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from eval_tasks.bench import checks, command, measure, operator, report, rivals, timing
from eval_tasks.bench.inputs import GEOMETRIES, Geometry, make_inputs
from nc_patch.cli import main
from nc_patch.config import NCConfig
from nc_patch.functional import sparse_attention

CPU = torch.device("cpu")
TINY = Geometry(4, 2, 16)
PHASES = pytest.mark.parametrize("phase", ["decode", "prefill"])


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A geometry that takes no time, and few sets of inputs."""
    monkeypatch.setitem(GEOMETRIES, "tiny", TINY)
    monkeypatch.setattr(operator, "_MOST_SETS", 2)
    monkeypatch.setattr(operator, "_FEWEST_SETS", 2)


def bench(phase, out, *further):
    arguments = ["--device", "cpu", "--geometry", "tiny", "--lengths", "64", "200", "--repeats", "2", "--alpha", "4"]
    more = ["--set", "dense_below=0"] if phase == "prefill" else []
    return main(["bench", phase, *arguments, *more, "--out", str(out), *further])


def read(phase, out):
    return json.loads((out / f"{phase}.json").read_text())


def row_of(method, length, seconds=None, kind="dense", **more):
    known = {"geometry": "tiny", "batch": 1, "length": length, "method": method, "kind": kind, "status": "ok"}
    return {**known, **({} if seconds is None else {"median_seconds": seconds}), **more}


@pytest.mark.parametrize(
    ("phase", "forms"), [("decode", ("gqa", "rows")), ("prefill", ("gqa", "expanded"))], ids=["decode", "prefill"]
)
def test_a_run_writes_every_method_of_every_case_right_and_timed(tmp_path, capsys, phase, forms):
    assert bench(phase, tmp_path, "--batch", "1", "2") == 0
    record = read(phase, tmp_path)
    assert record["versions"]["torch"] == torch.__version__
    assert record["command"].startswith(f"nc-patch bench {phase} --device cpu")
    methods = {"topk", "block", "window", *(f"sdpa {b}, {f}" for b in ("flash", "math") for f in forms)}
    ran = {(row["batch"], row["length"], row["method"]): row for row in record["rows"] if row["status"] == "ok"}
    assert ran.keys() == {(batch, length, method) for batch in (1, 2) for length in (64, 200) for method in methods}
    for row in ran.values():
        assert row["right"]
        assert row["relative_error"] < 1e-3
        assert row["compared_with"] == "reference, float64"
        assert row["median_seconds"] > 0
        assert row["kind"] == "dense" or 0 < row["kept_mass"] <= 1
        assert row["kind"] == "dense" or row["backend"] == "cpu" or row["backend"].startswith("torch")
    assert {row["status"] for row in record["rows"] if "cudnn" in row["method"]} == {"absent"}
    said = capsys.readouterr().out
    for part in ("budget 4 n^0.5", "Faster than the fastest dense:", "sdpa cudnn, gqa: the cudnn backend needs a GPU"):
        assert part in said
    assert (tmp_path / f"{phase}.png").read_bytes().startswith(b"\x89PNG")


@PHASES
def test_inputs_are_the_same_for_a_seed_and_others_for_another_and_cold_in_decoding(phase):
    def draw(seed):
        settings = operator.Settings(CPU, torch.bfloat16, ["tiny"], [2], [70], ["topk"], 4.0, 0.5, 1, seed=seed)
        return operator.make_sets(settings, settings.cases()[0], phase)

    first, again, other = draw(0), draw(0), draw(1)
    assert len(first) == (2 if phase == "decode" else 1)
    assert first[0].query.shape == (2, 4, 1 if phase == "decode" else 70, 16)
    for name in ("query", "key", "value"):
        one, same, another = (getattr(sets[0], name) for sets in (first, again, other))
        assert torch.equal(one, same)
        assert not torch.equal(one, another)
        assert one.isfinite().all()
        assert one.count_nonzero() > 0.9 * one.numel()


def test_topk_decodes_with_the_tail_of_the_default_from_means_that_are_kept(tmp_path, monkeypatch):
    plain, kinds = operator.sparse_attention, []

    def attend(*arguments, index, means, **options):
        selection = options["selection"]
        kinds.append((selection.name, selection.uses_means, index and index.kind, means and means.kind))
        return plain(*arguments, index=index, means=means, **options)

    monkeypatch.setattr(operator, "sparse_attention", attend)
    assert bench("decode", tmp_path) == 0
    assert set(kinds) == {
        ("topk", True, "codes", "means"),
        ("block", False, "pages", None),
        ("window", False, None, None),
    }


@PHASES
def test_beyond_the_reference_outputs_are_compared_with_the_pytorch_backend(tmp_path, monkeypatch, phase):
    monkeypatch.setattr(checks, "REFERENCE_KEYS", 100)
    assert bench(phase, tmp_path, "--dtype", "bfloat16") == 0
    rows = [row for row in read(phase, tmp_path)["rows"] if "right" in row]
    against = {64: "reference, float64", 200: "PyTorch backend"}
    assert {row["method"] for row in rows} >= {"topk", "block", "window", "sdpa math, gqa"}
    assert all(row["compared_with"] == against[row["length"]] for row in rows)


@PHASES
def test_a_wrong_output_is_recorded_and_the_run_fails(tmp_path, capsys, monkeypatch, phase):
    right = operator.sparse_attention
    monkeypatch.setattr(operator, "sparse_attention", lambda *a, **k: right(*a, **k) * 1.1)
    assert bench(phase, tmp_path, "--selections", "window") == 1
    rows = [row for row in read(phase, tmp_path)["rows"] if row["method"] == "window"]
    assert [row["status"] for row in rows] == ["wrong"] * 2
    assert all("median_seconds" not in row for row in rows)
    assert "sparse attention failed or was wrong in 2 rows" in capsys.readouterr().err


def test_a_graph_that_replays_something_else_is_recorded_as_wrong(tmp_path, monkeypatch):
    def prepare(step, steps, device, graph):
        prepared = timing.prepare(step, steps, device, graph)
        return dataclasses.replace(prepared, captured=True, replayed=step(0) * torch.nan)

    monkeypatch.setattr(measure, "prepare", prepare)
    assert bench("decode", tmp_path, "--selections", "topk") == 1
    rows = [row for row in read("decode", tmp_path)["rows"] if row["method"] == "topk"]
    assert [row["status"] for row in rows] == ["wrong"] * 2
    assert all(row["message"].endswith("in a CUDA graph") for row in rows)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(torch.OutOfMemoryError("no 9 GB"), "out of memory", 0), (RuntimeError("a kernel broke"), "error", 1)],
    ids=["memory", "error"],
)
def test_a_method_that_fails_is_recorded_with_its_message_and_the_others_go_on(
    tmp_path, capsys, monkeypatch, error, status, code
):
    def broken(*arguments, **options):
        raise error

    monkeypatch.setattr(operator, "sparse_attention", broken)
    assert bench("decode", tmp_path) == code
    rows = {(row["length"], row["method"]): row for row in read("decode", tmp_path)["rows"]}
    assert rows[64, "topk"]["status"] == status
    assert str(error) in rows[64, "topk"]["message"]
    assert rows[200, "sdpa math, rows"]["status"] == "ok"
    assert str(error) in capsys.readouterr().out


@PHASES
def test_a_case_without_memory_is_skipped_with_its_message(tmp_path, capsys, monkeypatch, phase):
    # Between what the two lengths need: bytes of queries, keys, values and outputs over the share that they may take.
    monkeypatch.setattr(operator, "free_bytes", lambda device: 100 * 2 * (4 + 2) * 16 * 4 / 0.6)
    assert bench(phase, tmp_path) == 0
    rows = read(phase, tmp_path)["rows"]
    assert [(row["length"], row["status"]) for row in rows if row["kind"] == "case"] == [(200, "out of memory")]
    assert any(row["length"] == 64 and row["status"] == "ok" for row in rows)
    assert "GB of queries, keys, values" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stop", "says"),
    [(KeyboardInterrupt(), "interrupted"), (RuntimeError("the GPU is gone"), "RuntimeError: the GPU is gone")],
    ids=["key", "gpu"],
)
def test_what_was_measured_before_a_stop_is_written_and_reported(tmp_path, capsys, monkeypatch, stop, says):
    plain = command.measure_all

    def measure_all(*arguments):
        yield next(plain(*arguments))
        raise stop

    monkeypatch.setattr(command, "measure_all", measure_all)
    assert bench("decode", tmp_path) == 1
    record = read("decode", tmp_path)
    assert record["stopped"] == says
    assert {row["length"] for row in record["rows"]} == {64}
    said = capsys.readouterr()
    assert "budget 4 n^0.5" in said.out
    assert f"nc-patch bench: stopped: {says}" in said.err


def test_after_the_deadline_no_case_begins(tmp_path, capsys):
    assert bench("decode", tmp_path, "--minutes", "1e-9") == 1
    assert {row["status"] for row in read("decode", tmp_path)["rows"]} == {"out of time"}
    assert "nothing could be timed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("phase", "further", "message"),
    [
        ("decode", ("--lengths", "1"), "--lengths: a length must be at least 2, got 1"),
        ("decode", ("--lengths", "many"), "invalid positive value: 'many'"),
        ("decode", ("--lengths", "64", "64"), "--lengths: 64 is given twice"),
        ("decode", ("--batch", "0"), "must be at least 1, got 0"),
        ("decode", ("--geometry", "cube"), "invalid choice: 'cube'"),
        ("decode", ("--selections", "dense"), "invalid choice: 'dense'"),
        ("decode", ("--dtype", "int8"), "invalid choice: 'int8'"),
        ("decode", ("--alpha", "-1"), "alpha must be a positive number"),
        ("decode", ("--C", "1.5"), "C must be a number in [0, 1]"),
        ("decode", ("--minutes", "0"), "--minutes must be a positive number, got 0.0"),
        ("decode", ("--device", "abacus"), "invalid choice: 'abacus'"),
        ("decode", ("--device", "cuda"), "Use --device cpu"),
        ("prefill", ("--set", "block_size=48"), "block_size must be one of"),
        ("prefill", ("--set", "min_mass=2"), "min_mass must be a number in (0, 1)"),
        ("prefill", ("--set", "dense_below=-1"), "dense_below must be at least 0, got -1"),
        ("prefill", ("--set", "stride=4"), "unknown option stride"),
        ("prefill", ("--set", "dense_below"), "must be OPTION=VALUE"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path, capsys, monkeypatch, phase, further, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert bench(phase, tmp_path / "out", *further) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_crossovers_are_interpolated_between_lengths():
    def crossing(*times):
        rows = [row_of("sdpa", n, dense) for n, dense, _ in times]
        return report.crossovers(rows + [row_of("topk", n, sparse, "sparse") for n, _, sparse in times])[0]

    assert crossing((100, 1.0, 2.0), (400, 4.0, 2.0))["length"] == 200
    assert "at every length measured, from 100" in crossing((100, 2.0, 1.0), (400, 4.0, 2.0))["says"]
    assert "not up to 400 keys, where it takes 1.50 times" in crossing((100, 2.0, 1.0), (400, 4.0, 6.0))["says"]


def test_methods_have_their_turns_and_hopeless_ones_or_those_that_raise_leave_the_others(monkeypatch):
    order, seconds = [], {"fast": 1.0, "slow": 9.0}

    def seconds_of(prepared, device):
        order.append(prepared.launch())
        if order[-1] == "broken":
            raise MemoryError("gone")
        return seconds[order[-1]]

    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    methods = {name: timing.Prepared(lambda name=name: name, 1) for name in ("fast", "slow", "broken")}
    taken, raised = timing.interleave(methods, 10, CPU)
    assert {name: len(times) for name, times in taken.items()} == {"fast": 10, "slow": 3}
    assert list(raised) == ["broken"]
    assert order == ["fast", "slow", "broken", *["fast", "slow"] * 2, *["fast"] * 7]


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ([], None),
        ([row_of("fast", 100, 1.0), row_of("slow", 100, 1.9)], None),
        ([row_of("fast", 100, 1.0), row_of("slow", 100, 2.1)], "took 2.1 times as long"),
        ([row_of("fast", 100, 0.1), row_of("slow", 100, 0.21)], None),
        ([row_of("slow", 100, status="left out", message="took 9 times")], "took 9 times"),
    ],
    ids=["first", "fast-enough", "slow", "slow-and-short", "left-out"],
)
def test_methods_that_were_slow_are_left_out_of_long_cases(before, message):
    row, late = row_of("slow", 200), row_of("slow", 200)
    assert measure.is_wanted(row, before, math.inf, growth=2.0) is (message is None)
    assert message is None or message in row["message"]
    assert not measure.is_wanted(late, before, 0.0, growth=2.0)
    assert late["status"] == "out of time"


def drawn(length=200, batch=1, queries=None, seed=0, geometry=TINY):
    generator = torch.Generator().manual_seed(seed)
    return make_inputs(geometry, batch, length, queries or length, torch.float32, generator)


def dense(inputs):
    return scaled_dot_product_attention(
        *(inputs.query, inputs.key, inputs.value), is_causal=inputs.query.shape[2] > 1, enable_gqa=True
    )


@pytest.mark.parametrize("queries", [200, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("selection", ["block", "topk", "window", "dense"])
def test_both_ways_to_what_is_right_agree(selection, queries, monkeypatch):
    options = {"min_mass": 0.8, "tail": "drop", "dense_below": 0}
    inputs, config = drawn(queries=queries), NCConfig(2.0, 0.6, selection=selection, **options)
    rows, phase = checks.checked_rows(queries, 64), "prefill" if queries > 1 else "decode"
    reference = checks.expected_output(inputs, config, phase, rows)
    monkeypatch.setattr(checks, "REFERENCE_SCORES", 0)
    other = checks.expected_output(inputs, config, phase, rows)
    assert other.against != reference.against
    assert (other.output - reference.output).norm() < 1e-5 * reference.output.norm()
    assert other.attended == pytest.approx(reference.attended)
    assert other.kept_mass == pytest.approx(reference.kept_mass, rel=1e-5)
    if selection == "dense":
        assert checks.compare(dense(inputs), reference, selection)["right"]
        assert not checks.compare(1.01 * dense(inputs), reference, selection)["right"]
    elif phase == "prefill":
        whole = sparse_attention(inputs.query, inputs.key, inputs.value, alpha=2.0, C=0.6, selection=selection,
                                 **options)  # fmt: skip
        assert checks.compare(whole, reference, selection)["right"]


def test_a_value_that_is_not_finite_in_a_row_that_is_not_compared_is_wrong():
    inputs, config = drawn(), NCConfig(2.0, 0.6, selection="dense")
    right = checks.expected_output(inputs, config, "prefill", torch.arange(64))
    output = dense(inputs)
    assert checks.compare(output, right, "dense")["right"]
    output[:, :, 150] = torch.nan
    assert not checks.compare(output, right, "dense")["right"]


def test_checked_rows_are_whole_query_blocks_with_the_first_and_the_last():
    assert checks.checked_rows(50, 64).tolist() == list(range(50))
    rows = checks.checked_rows(1000, 64)
    assert len(rows) == len(rows.unique()) == 3 * 64 + 1000 - 960
    assert rows[:64].tolist() == list(range(64))
    assert rows[-1] == 999


def test_options_reach_the_attention(tmp_path):
    def block(out, *further):
        arguments = ["--device", "cpu", "--geometry", "tiny", "--lengths", "300", "--repeats", "1", "--alpha", "1"]
        known = ["--selections", "block", "--out", str(tmp_path / out)]
        assert main(["bench", "prefill", *arguments, *known, *further]) == 0
        record = json.loads((tmp_path / out / "prefill.json").read_text())
        return record["rows"][0], record["settings"]["options"][0]

    plain, _ = block("plain", "--set", "dense_below=0")
    more = (
        "min_mass=0.99",
        "max_factor=8",
        "block_size=32",
        "query_block_size=128",
        "sample_stride=1",
        "local_keys=32",
    )
    enlarged, options = block("more", "--set", "dense_below=0", *more)
    assert enlarged["kept_mass"] > plain["kept_mass"]
    assert enlarged["attended"] > plain["attended"]
    names = ("size", "query_block_size", "sample_stride", "local_keys")
    assert [options[name] for name in names] == [32, 128, 1, 32]
    assert block("dense", "--set", "dense_below=300")[0]["kept_mass"] == pytest.approx(1)


def test_prompts_are_local_have_sinks_and_seek_few_of_the_other_keys():
    n, budget = 4096, round(4 * 4096**0.6)
    inputs = drawn(n, geometry=Geometry(6, 2, 64))
    query, key = inputs.query[0, :, 2048:].float(), inputs.key[0].float().repeat_interleave(3, 0)
    scores = (query @ key.transpose(1, 2)) * 64**-0.5
    scores.masked_fill_(torch.arange(n) > torch.arange(2048, n)[:, None], -torch.inf)
    softmax = torch.softmax(scores, -1)
    last = softmax[:, ::64]
    assert 0.88 < last.topk(budget, -1).values.sum(-1).mean() < 0.99
    assert 0.15 < last[..., :4].sum(-1).mean() < 0.6
    own = torch.stack([softmax[:, i, i + 2048 - 64 : i + 2048 + 1].sum(-1) for i in range(0, 2048, 64)]).mean()
    assert 0.03 < own < 0.4
    # Queries of one run seek what others of the run seek: their softmaxes overlap more than those of far rows do.
    kept = softmax[:, :, 64:1900]
    near, far = ((kept[:, 1000] * kept[:, other]).sum(-1).mean() for other in (1001, 1700))
    assert near > far


@pytest.mark.parametrize(("phase", "form"), [("prefill", "expanded"), ("decode", "rows")])
def test_the_rivals_here_are_right_and_the_others_say_why_they_are_not(phase, form):
    inputs, absent = drawn(queries=None if phase == "prefill" else 1, batch=2), set()
    for name, make in rivals.rivals(phase).items():
        try:
            assert torch.allclose(make([inputs])(0), dense(inputs), atol=1e-5)
        except rivals.Absent as error:
            absent.add(f"{name}: {error}")
    assert absent == {
        f"sdpa {b}, {f}: the {b} backend needs a GPU" for b in ("cudnn", "efficient") for f in ("gqa", form)
    }


def test_plain_attention_is_not_tried_on_long_prompts(monkeypatch):
    monkeypatch.setattr(rivals, "_MATH_KEYS", 100)
    with pytest.raises(rivals.Absent, match="tried up to 100 keys"):
        rivals.rivals("prefill")["sdpa math, gqa"]([drawn()])

"""``nc-patch bench``: what it measures and writes on the CPU, at sizes that say nothing about speed."""

import dataclasses
import importlib.util
import json
import sys
import types

import pytest
import torch

from nc_patch.bench import checks, command, decode, dense_rivals, inputs, report, timing, traffic
from nc_patch.bench.inputs import GEOMETRIES
from nc_patch.cli import main
from nc_patch.config import NCConfig
from nc_patch.selections import Block, TopK, Window

CPU = torch.device("cpu")
TINY = inputs.Geometry(4, 2, 16, 64, 96, 2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A geometry and copies that take no time; few sets of inputs."""
    monkeypatch.setitem(GEOMETRIES, "tiny", TINY)
    monkeypatch.setitem(decode.DECODE.defaults["cpu"], "ceiling_size", 4)
    monkeypatch.setattr(decode, "_MOST_SETS", 2)
    monkeypatch.setattr(decode, "_FEWEST_SETS", 2)


def bench(out, *further):
    arguments = ("--device", "cpu", "--geometry", "tiny", "--lengths", "64", "200", "--repeats", "2")
    return main(["bench", "decode", *arguments, "--out", str(out), *further])


def read(out):
    return json.loads((out / decode.DECODE.file).read_text())


def test_a_run_writes_every_method_of_every_case_right_and_timed(tmp_path, capsys):
    assert bench(tmp_path, "--batch", "1", "2") == 0
    record = read(tmp_path)
    assert record["versions"]["torch"] == torch.__version__
    assert record["command"].startswith("nc-patch bench decode --device cpu")
    assert record["copy_bytes_per_second"] > 0
    timed = {(row["batch"], row["length"], row["method"]): row for row in record["rows"] if row["status"] == "ok"}
    for batch in (1, 2):
        for length in (64, 200):
            for method in ("topk", "block", "window", "sdpa flash, rows", "sdpa math, gqa"):
                row = timed[batch, length, method]
                assert row["right"]
                assert row["relative_error"] < 1e-3
                assert row["compared_with"] == "reference, float64"
                assert row["median_seconds"] > 0
                assert row["roofline_fraction"] > 0
    assert {row["status"] for row in record["rows"] if "cudnn" in row["method"]} == {"absent"}
    said = capsys.readouterr().out
    assert "tiny, batch 2, budget 12 n^0.5" in said
    assert "Faster than the fastest dense:" in said
    assert "Slower than it:" in said
    assert "sdpa cudnn, gqa: the cudnn backend needs a GPU" in said


def test_topk_decodes_with_the_tail_of_the_default_from_means_that_are_kept(tmp_path, monkeypatch):
    plain, kinds = decode.sparse_attention, []

    def attend(*arguments, index, means, **options):
        selection = options["selection"]
        kinds.append((selection.name, selection.uses_means, index and index.kind, means and means.kind))
        return plain(*arguments, index=index, means=means, **options)

    monkeypatch.setattr(decode, "sparse_attention", attend)
    assert bench(tmp_path) == 0
    assert set(kinds) == {
        ("topk", True, "codes", "means"),
        ("block", False, "pages", None),
        ("window", False, None, None),
    }


@pytest.mark.parametrize("benchmark", ["decode", "prefill"])
def test_only_the_kinds_of_dense_attention_that_were_asked_for_run(tmp_path, benchmark):
    arguments = ("--device", "cpu", "--geometry", "tiny", "--lengths", "64", "--selections", "window", "--repeats", "1")
    main(["bench", benchmark, *arguments, "--out", str(tmp_path), "--dense", "flex", "flash_attn"])
    assert {row["method"] for row in json.loads((tmp_path / f"{benchmark}.json").read_text())["rows"]} == {"window"}


def test_beyond_the_reference_outputs_are_compared_with_the_pytorch_backend(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "REFERENCE_KEYS", 100)
    assert bench(tmp_path, "--dtype", "bfloat16") == 0
    against = {(row["length"], row["method"]): row["compared_with"] for row in read(tmp_path)["rows"] if "right" in row}
    assert against[64, "topk"] == "reference, float64"
    assert against[200, "topk"] == against[200, "block"] == against[200, "window"] == "PyTorch backend"
    assert against[200, "sdpa math, rows"] == "float64"


def test_a_wrong_output_is_recorded_and_the_run_fails(tmp_path, capsys, monkeypatch):
    right = decode.sparse_attention
    monkeypatch.setattr(decode, "sparse_attention", lambda *a, **k: right(*a, **k) * 1.1)
    assert bench(tmp_path, "--selections", "window") == 1
    rows = [row for row in read(tmp_path)["rows"] if row["method"] == "window"]
    assert all(row["status"] == "wrong" and "median_seconds" not in row for row in rows)
    assert "sparse attention failed or was wrong in 2 rows" in capsys.readouterr().err


def test_a_graph_that_replays_something_else_is_recorded_as_wrong(tmp_path, monkeypatch):
    def prepare(step, steps, device):
        prepared = timing.prepare(step, steps, device)
        return dataclasses.replace(prepared, captured=True, replayed=step(0) * torch.nan)

    monkeypatch.setattr(decode, "prepare", prepare)
    assert bench(tmp_path, "--selections", "topk") == 1
    rows = [row for row in read(tmp_path)["rows"] if row["method"] == "topk"]
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
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(decode, "sparse_attention", fail)
    assert bench(tmp_path) == code
    rows = {(row["length"], row["method"]): row for row in read(tmp_path)["rows"]}
    assert rows[64, "topk"]["status"] == status
    assert str(error) in rows[64, "topk"]["message"]
    assert rows[200, "sdpa math, rows"]["status"] == "ok"
    assert str(error) in capsys.readouterr().out


def test_a_case_without_memory_is_skipped_with_its_message(tmp_path, capsys, monkeypatch):
    plain = decode.make_inputs

    def make(geometry, batch, length, *rest):
        if length > 100:
            raise torch.OutOfMemoryError("no room for 200 keys")
        return plain(geometry, batch, length, *rest)

    monkeypatch.setattr(decode, "make_inputs", make)
    assert bench(tmp_path) == 0
    assert [row["message"] for row in read(tmp_path)["rows"] if row["kind"] == "case"] == [
        "OutOfMemoryError: no room for 200 keys"
    ]
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt(), RuntimeError("CUDA error: the device is gone")], ids=["key", "gpu"]
)
def test_what_was_measured_before_a_stop_is_written_and_reported(tmp_path, capsys, monkeypatch, stop):
    plain = command.measure_all

    def measure(*arguments):
        yield next(plain(*arguments))
        raise stop

    monkeypatch.setattr(command, "measure_all", measure)
    assert bench(tmp_path) == 1
    record = read(tmp_path)
    assert record["stopped"] in ("interrupted", "RuntimeError: CUDA error: the device is gone")
    assert {row["length"] for row in record["rows"]} == {64}
    said = capsys.readouterr()
    assert "tiny, batch 1, budget" in said.out
    assert "nc-patch bench: stopped: " in said.err


def test_after_the_deadline_no_case_begins(tmp_path, capsys):
    assert bench(tmp_path, "--minutes", "1e-9") == 1
    assert {row["status"] for row in read(tmp_path)["rows"]} == {"out of time"}
    assert "nothing could be timed" in capsys.readouterr().err


def test_without_matplotlib_there_is_no_plot_and_it_says_so(tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench(tmp_path, "--selections", "window") == 0
    assert "no plot: matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / decode.DECODE.plot).exists()


def test_with_matplotlib_there_is_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert bench(tmp_path, "--selections", "window") == 0
    assert (tmp_path / decode.DECODE.plot).read_bytes().startswith(b"\x89PNG")


def test_generate_counts_tokens_of_dense_and_patched_models_with_both_caches(tmp_path, capsys):
    assert bench(tmp_path, "--generate", "40", "--selections", "topk", "block") == 0
    rows = read(tmp_path)["generate"]
    assert {(row["cache"], row["method"]) for row in rows} == {
        (cache, method) for cache in ("dynamic", "static") for method in ("dense", "topk", "block")
    }
    assert all(row["status"] == "ok" and row["tokens_per_second"] > 0 for row in rows)
    assert "generate, a random model of few layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (("--lengths", "1"), "must be at least 2, got 1"),
        (("--lengths", "many"), "must be an integer, got 'many'"),
        (("--lengths", "64", "64"), "--lengths: 64 is given twice"),
        (("--batch", "0"), "must be at least 1, got 0"),
        (("--geometry", "cube"), "invalid choice: 'cube'"),
        (("--dense", "flex", "flex"), "--dense: flex is given twice"),
        (("--selections", "dense"), "invalid choice: 'dense'"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--alpha", "-1"), "alpha must be a positive number"),
        (("--C", "1.5"), "C must be a number in [0, 1]"),
        (("--minutes", "0"), "--minutes must be a positive number, got 0.0"),
        (("--generate", "1"), "must be at least 2, got 1"),
        (("--device", "abacus"), "invalid choice: 'abacus'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path, capsys, further, message):
    assert bench(tmp_path / "out", *further) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_command_a_missing_out_a_file_and_a_gpu_that_is_not_there_are_refused(tmp_path, capsys, monkeypatch):
    assert main(["bench"]) == 2
    assert main(["bench", "decode"]) == 2
    assert "--out" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert bench(tmp_path / "file") == 2
    assert "is a file; give a directory" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench(tmp_path, "--device", "cuda") == 2
    assert "sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("n", [1024, 16384])
def test_scores_hold_most_of_their_mass_in_about_the_square_root_of_the_keys(n):
    one = inputs.make_inputs(inputs.Geometry(8, 2, 64, 64, 64, 1), 1, n, torch.float32, CPU, [], 0)
    found = inputs.concentration(one, n // 4)
    assert n**0.5 / 3 < found["keys_of_mass"] < 3 * n**0.5
    assert found["best_keys_mass"] > 0.95


def test_inputs_are_the_same_for_a_seed_and_others_for_another():
    first, again, other = (inputs.make_inputs(TINY, 2, 70, torch.bfloat16, CPU, ["topk"], seed) for seed in (0, 0, 1))
    assert torch.equal(first.key, again.key)
    assert torch.equal(first.query, again.query)
    assert not torch.equal(first.key, other.key)
    assert set(first.indexes) == {"topk"}


def test_bytes_follow_from_shapes():
    geometry = inputs.Geometry(8, 2, 64, 0, 0, 0)
    ends = 2 * 3 * 8 * 64 * 2
    row = 64 * 2
    assert traffic.dense_bytes(geometry, 3, 1000, 2) == 3 * 2 * 1000 * 2 * row + ends
    assert traffic.sparse_bytes(Window(), geometry, 3, 1000, 100, 2) == 3 * 2 * 100 * 2 * row + ends
    pages = 63 * (3 * 64 + 12) + 112 * 2 * row + row + (3 * 64 + 12) // 16
    assert traffic.sparse_bytes(Block(), geometry, 3, 1000, 100, 2) == 3 * 2 * pages + ends
    codes = 1001 * (64 + 8) + 4 * 100 * 2 * row + row
    assert traffic.sparse_bytes(TopK(tail="drop"), geometry, 3, 1000, 100, 2) == 3 * 2 * codes + ends
    means = 63 * 2 * row + 2 * row + 2 * row // 16
    assert traffic.sparse_bytes(TopK(), geometry, 3, 1000, 100, 2) == 3 * 2 * (codes + means) + ends
    many = traffic.sparse_bytes(TopK(tail="drop"), geometry, 1, 1000, 900, 2)
    assert many < traffic.dense_bytes(geometry, 1, 2000, 2)


def test_the_crossover_is_interpolated_between_measured_lengths():
    def rows(times):
        for length, dense, sparse in times:
            known = {"geometry": "tiny", "batch": 1, "length": length, "status": "ok"}
            yield {**known, "method": "sdpa", "kind": "dense", "median_seconds": dense}
            yield {**known, "method": "topk", "kind": "sparse", "median_seconds": sparse}

    def crossing(*times):
        return report.crossovers(list(rows(times)), ["topk"])[0]

    assert crossing((100, 1.0, 2.0), (400, 4.0, 2.0))["length"] == 200
    assert "at every length measured, from 100" in crossing((100, 2.0, 1.0), (400, 4.0, 2.0))["says"]
    assert "not up to 400 keys, where it takes 1.50 times" in crossing((100, 2.0, 1.0), (400, 4.0, 6.0))["says"]


def test_hopeless_methods_are_not_repeated(monkeypatch):
    seconds = {"fast": 1.0, "slow": 9.0}
    monkeypatch.setattr(timing, "seconds_of", lambda prepared, device: seconds[prepared.launch()])
    methods = {name: timing.Prepared(lambda name=name: name, 1) for name in seconds}
    taken, raised = timing.interleave(methods, 10, CPU)
    assert {name: len(times) for name, times in taken.items()} == {"fast": 10, "slow": 3}
    assert not raised


def test_a_method_that_raises_while_it_is_timed_leaves_the_others():
    def breaks():
        raise MemoryError("gone")

    methods = {"sound": timing.Prepared(lambda: None, 1), "broken": timing.Prepared(breaks, 1)}
    taken, raised = timing.interleave(methods, 4, CPU)
    assert len(taken["sound"]) == 4
    assert list(raised) == ["broken"]
    assert "broken" not in taken


def test_rivals_that_are_not_installed_are_absent_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    one = inputs.make_inputs(TINY, 1, 64, torch.float32, CPU, [], 0)
    for name in ("flash_attn", "flash_attn 3", "flashinfer"):
        with pytest.raises(dense_rivals.Absent, match="is not installed"):
            dense_rivals.rivals(torch.device("cuda"))[name]([one])


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn 3", "flashinfer"])
def test_rivals_of_other_packages_are_called_with_their_layouts(name, monkeypatch):
    """Stand-ins with the packages' documented layouts; whether the packages agree only a GPU can tell."""

    def attend(query, key, value):
        groups = query.shape[2] // key.shape[2]
        query, key, value = (t.transpose(1, 2).float() for t in (query, key, value))
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    class Wrapper:
        def __init__(self, workspace, layout, **options):
            assert layout == "HND"

        def plan(self, indptr, indices, last, heads, kv_heads, head_dim, page_size, **options):
            self.pages = [indices[indptr[b] : indptr[b + 1]].long() for b in range(len(last))]
            assert last.tolist() == [page_size] * len(last)

        def run(self, query, pages):
            flat = [torch.stack([t[p].transpose(1, 2).flatten(0, 1) for p in self.pages]) for t in pages]
            return attend(query[:, None], *flat)[:, 0]

    module = types.SimpleNamespace(
        flash_attn_with_kvcache=attend, BatchDecodeWithPagedKVCacheWrapper=Wrapper, __spec__=object()
    )
    for package in ("flash_attn", "flash_attn_interface", "flashinfer"):
        monkeypatch.setitem(sys.modules, package, module)
    sets = [inputs.make_inputs(TINY, 2, 128, torch.float32, CPU, [], seed) for seed in (0, 1)]
    step = dense_rivals.rivals(torch.device("cuda"))[name](sets)
    for i in (0, 1):
        right = checks.expected_output(sets[i], NCConfig(4.0, 0.6, selection="dense"))
        assert checks.compare(step(i), right, "dense")["right"]

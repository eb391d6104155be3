"""The report: all of it escaped and in one file, words that follow the numbers, and a page that fits its screen."""

import itertools
import json
import math
import re
import shutil
import subprocess

import pandas as pd
import pytest

from eval_tasks.figures import position_panels
from eval_tasks.methods import METHODS
from eval_tasks.report import Report, write_report
from eval_tasks.stats import paired_difference
from eval_tasks.summary import comparisons, effective_lengths, measurements, needed_budgets, overview, summarise
from nc_patch.cli import main

NASTY = "<script>alert('x')</script>& ![x](http://x.org/x.png)"


def row(task, length, sample, method, perplexity=None, **further):
    """A measurement: of a text where there is a perplexity, else of an answer with the score that is given."""
    text = {"loss_sum": 10 * math.log(perplexity), "tokens": 10, "bytes": 40} if perplexity else {}
    counts = {"attended_fraction": 1.0 if method == "dense" else 0.05, "mean_keys": 50.0, "tail_mean_keys": 60.0}
    costs = {"seconds": 2.0, "peak_memory": 5_000_000, "ran_dense": {}, "commit": NASTY, "tail_attended_fraction": 0.05}
    which = {"method": method, "task": task, "length": length, "sample": sample, "phase": "all", "budget": 64}
    return which | text | counts | costs | further


def rows_of(task, length, perplexities, samples=3, **further):
    return [row(task, length, i, method, p, **further) for i in range(samples) for method, p in perplexities.items()]


def answers_of(length, rights, samples=20, task="niah_single_1", **further):
    return [
        row(task, length, i, method, score=float(right(i)), depth=i / samples, **further)
        for i, (method, right) in itertools.product(range(samples), rights.items())
    ]


def failed(entry):
    cell = ("method", "task", "length", "sample", "phase")
    return {name: entry[name] for name in cell} | {"failed": "out of memory"}


def run_of(sessions=({"started": "now"},), **identity):
    """What ``run.json`` says, of one machine unless there are other sessions."""
    known = {"model": "tiny", "methods": list(METHODS), "tasks": ["recall", "unseen", "perplexity"], "lengths": [4096]}
    known |= {"samples": 3, "scored": 10, "passage": 10, "alpha": 2.0, "C": 0.5, "equal_at": 1024, "seed": 0}
    model = {"model_class": "LlamaForCausalLM", "model_dtype": "float32", "model_parameters": 10}
    text = {"text_origin": NASTY, "text_tokens": 1000}
    here = {"planned": 14, "hardware": {"processor": NASTY, "threads": 2}, "sessions": sessions}
    return {"identity": known | {"phase": "all", "match": "deploy"} | identity, **model, **text, **here}


def write_run(directory, rows, **identity):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows), encoding="utf-8")
    run = run_of(**identity) | {"command": f"nc-patch eval --out {directory.name}"}
    (directory / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return directory


def said_of(rows, **further):
    """What the report of some rows says, but for its tables of all numbers."""
    report = Report(run_of(**further), rows, 0.05)
    table = [report.table.title, report.table.to_text()] if report.table else []
    return " ".join([report.result, report.progress, *report.caveats, *table])


def summary_of(rows):
    frame = measurements(rows)
    return summarise(frame, comparisons(frame, 0.05)).set_index(["task", "length", "method"])


def test_the_report_escapes_every_text_and_refers_to_nothing_outside_itself(tmp_path):
    rows = rows_of("recall", 4096, {"dense": 2.0, "nc-topk": 7.0, "fixed-topk": 25.7}, ran_dense={NASTY: 3})
    write_report([write_run(tmp_path / "<b>", rows, model=NASTY)])
    page = (tmp_path / "<b>" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>" not in page
    assert page.count("&lt;script&gt;") >= 5
    assert {source.partition(":")[0] for source in re.findall(r'(?:src|href|srcset)="([^"]*)"', page)} == {"data"}


def test_runs_of_the_same_settings_are_reported_together_and_others_are_refused_by_what_differs(tmp_path, capsys):
    dense = rows_of("recall", 4096, {"dense": 2.0})
    first = write_run(tmp_path / "a", dense + rows_of("recall", 4096, {"nc-topk": 3.0}), methods=["dense", "nc-topk"])
    second = write_run(tmp_path / "b", dense + rows_of("recall", 4096, {"window": 9.0}), methods=["dense", "window"])
    assert main(["report", str(first), str(second), "--out", str(tmp_path / "all")]) == 0
    table = pd.read_csv(tmp_path / "all" / "summary.csv")
    assert list(zip(table["method"], table["samples"], strict=True)) == [("dense", 3), ("window", 3), ("nc-topk", 3)]
    page = (tmp_path / "all" / "report.html").read_text(encoding="utf-8")
    assert [f"nc-patch eval --out {name}" in page for name in "ab"] == [True, True]
    assert "9 of 25 measurements are made; the same command goes on." in page  # of 14 each, three of them the same
    assert (tmp_path / "all" / "main.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(first), str(second)]) == 2
    assert "--out DIR" in capsys.readouterr().err
    for changed, message in (({"alpha": 4.0}, "alpha was 2.0, is 4.0"), ({"lengths": [8]}, "longest was 4096, is 8")):
        other = write_run(tmp_path / "c", dense, **changed)
        assert main(["report", str(first), str(other), "--out", str(tmp_path / "none")]) == 2
        assert f"whose settings are others: {message}\n" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_summary_is_the_mean_of_the_samples_and_pairs_them_with_those_of_dense():
    rows = [row("perplexity", 512, i, "dense", p) for i, p in enumerate((10.0, 20.0, 40.0))]
    rows += [row("perplexity", 512, i, "nc-topk", p) for i, p in enumerate((12.0, 22.0))]
    rows += [failed(row("perplexity", 512, 0, "block", 9.0))]
    table = summary_of(rows).loc["perplexity", 512]
    dense, sparse, lost = table.loc["dense"], table.loc["nc-topk"], table.loc["block"]
    assert (dense["perplexity"], dense["bits_per_byte"]) == pytest.approx((20.0, math.log2(20) / 4))
    assert pd.isna(dense["loss_minus_dense"])
    expected = paired_difference([math.log(12), math.log(22)], [math.log(10), math.log(20)])
    assert (sparse["loss_minus_dense"], sparse["low"], sparse["high"]) == expected
    assert sparse["perplexity_ratio"] == pytest.approx(math.sqrt(1.2 * 1.1))
    assert (sparse["samples"], lost["samples"], lost["failed"]) == (2, 0, 1)


@pytest.mark.parametrize(("phase", "seconds"), [("all", 3.0), ("prefill", 2.0), ("decode", 1.0)])
def test_time_is_that_of_the_part_that_is_sparse(phase, seconds):
    times = {"seconds": 3.0, "prefill_seconds": 2.0, "phase": phase}
    [cell] = summary_of(rows_of("perplexity", 512, {"dense": 5.0}, **times)).itertuples()
    assert (cell.seconds, cell.sparse_seconds) == (3.0, seconds)
    answers = answers_of(512, {"dense": lambda i: 1}, seconds=4.0, said_tokens=11, first_token_seconds=2.0)
    [cell] = summary_of(answers).itertuples()
    assert (cell.seconds_per_answer_token, cell.answer_tokens) == pytest.approx((0.2, 11))


@pytest.mark.parametrize(
    ("losses", "reached"),
    [
        ({512: 1.01, 1024: 1.04, 2048: 1.2, 4096: 1.0}, 1024),
        ({512: 1.2, 1024: 1.0}, 0),
        ({512: 0.9, 8192: 1.0499}, 8192),
    ],
)
def test_the_effective_length_ends_at_the_first_length_outside(losses, reached):
    rows = [entry for n, factor in losses.items() for entry in rows_of("perplexity", n, {"dense": 2, "nc": 2 * factor})]
    for length, lost in ((1024, 1), (2048, 2)):  # five points, which the margin is, and ten
        rows += answers_of(length, {"dense": lambda i: i < 16, "nc": lambda i, lost=lost: i < 16 - lost})
    texts, answers = effective_lengths(comparisons(measurements(rows), 0.05)).itertuples(index=False)
    assert tuple(texts) == ("perplexity", "nc", reached, max(losses))
    assert tuple(answers) == ("niah_single_1", "nc", 1024, 2048)


def test_answers_are_compared_as_right_or_wrong_and_of_many_tasks_the_mean_is_shown_where_all_are_there():
    rights = {"dense": lambda i: 1, "nc-topk": lambda i: i > 0, "window": lambda i: i % 5 == 0}
    rows = answers_of(1024, rights)
    compared = comparisons(measurements(rows), 0.05).set_index("method")
    assert dict(compared["difference"]) == pytest.approx({"window": 0.8, "nc-topk": 0.05})
    assert dict(compared["verdict"]) == {"window": "worse", "nc-topk": "undecided"}
    assert "niah_single_1 −5 points (undecided)" in said_of(rows)
    rows += [entry for name in "bcd" for entry in answers_of(1024, rights, task=name)]
    shown = overview(summary_of(rows).reset_index())
    assert set(shown["task"]) == {"mean of 4 tasks"}
    assert list(shown["score"]) == pytest.approx([1.0, 0.2, 0.95])
    assert shown["low"].isna().all()
    assert "mean of 4 tasks −5 points (undecided in 4)" in said_of(rows)
    assert set(comparisons(measurements([failed(rows[0]), *rows[1:]]), 0.05)["margin"]) == {0.05}
    for method in ("dense", "nc-topk"):
        two = [entry for entry in rows if entry["method"] != "window"]
        lost = [failed(entry) if (entry["task"], entry["method"]) == ("b", method) else entry for entry in two]
        assert "mean of 4 tasks −" not in said_of(lost)


def test_iso_quality_is_what_an_iso_run_reports_and_unfinished_lengths_take_nothing_from_others():
    def measured(lengths, samples=8, budgets=(16, 64, 256)):
        levels = lambda n: {f"fixed-topk@{k}": 2.0 * (2.0 * n**0.5 / k) ** 0.5 for k in budgets}  # noqa: E731
        return [entry for n in lengths for entry in rows_of("recall", n, {"dense": 2.0} | levels(n), samples)]

    whole = measured((256, 1024, 4096))
    # Within 5 %: (2 √n / k)^½ = 1.05, that is k = 2 √n / 1.1025.
    said = said_of(whole, match="iso", methods=["dense", "fixed-topk"], lengths=[256, 1024, 4096])
    assert "needs 116 of 4,096 keys in recall perplexity, by length 1.81·n^0.50" in said
    found = needed_budgets(measurements(whole), 0.05)
    assert list(found["keys"]) == pytest.approx([2 * n**0.5 / 1.1025 for n in (256, 1024, 4096)])
    lost = [failed(entry) for entry in measured((8192,))]
    for unfinished in (measured((8192,), samples=1), measured((8192,), budgets=(16,)), lost):
        again = needed_budgets(measurements(whole + unfinished), 0.05)
        pd.testing.assert_frame_equal(again, found)
    assert needed_budgets(measurements(lost), 0.05).empty
    rest = [failed(e) if (e["length"], e["method"]) == (256, "fixed-topk@256") else e for e in whole]
    assert list(needed_budgets(measurements(rest), 0.05)["keys"]) == pytest.approx(list(found["keys"]))


def test_the_first_table_is_of_the_longest_length_that_can_be_judged_and_caveats_say_what_weakens_it():
    rows = rows_of("recall", 1024, {"dense": 2.0, "nc-topk": 3.0}, ran_dense={"a mask": 1})
    rows += rows_of("recall", 2048, {"dense": 2.0}) + rows_of("recall", 2048, {"nc-topk": 9.0}, samples=1)
    rows += rows_of("recall", 4096, {"dense": 30.0, "nc-topk": 33.0}) + rows_of("unseen", 4096, {"dense": 37.0})
    here, there = ({"hardware": {"processor": name, "cores": 4, "threads": 2}} for name in ("one", "another"))
    said = said_of([*rows, failed(row("recall", 4096, 0, "window", 2.0))], sessions=[here, there])
    for text in (
        "Against dense attention at 1,024 tokens",
        "Dense attention itself fails in recall perplexity at 4,096 tokens: judge no method there.",
        # Of the three lengths the last has no verdict, and the second is of one document.
        "With 1 comparisons a difference takes at least 6 documents",
        "Few samples: 1 documents",
        "Not measured, out of memory: fixed window in recall perplexity at 4,096 tokens (1 samples)",
        "ran dense: a mask",
        "Parts of this run were measured on different hardware",
    ):
        assert text in said
    assert "times as long" not in said
    assert "comparisons a difference" not in said_of(rows_of("recall", 512, {"dense": 2, "nc": 3}, 1))
    assert "nothing is compared" in said_of(rows_of("recall", 1024, {"nc-topk": 3.0, "window": 9.0}))


# Opens a page in frames of these widths, and says what sticks out of each or is too small to read, in pixels.
LOOK = """<body><script>const page = %s;
for (const width of [1280, 1049, 390]) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.srcdoc = page;
  frame.onload = () => {
    const inside = frame.contentDocument;
    for (const fold of inside.querySelectorAll("details")) fold.open = true;
    const main = inside.querySelector("table.main").parentElement;
    const size = e => parseFloat(inside.defaultView.getComputedStyle(e).fontSize);
    const sizes = [...inside.querySelectorAll("body *")].map(size);
    const drawn = [...inside.images].map(i => 13 * i.clientWidth / (0.75 * i.naturalWidth));
    const said = document.createElement("p");
    const wide = Math.max(inside.documentElement.scrollWidth - width, main.scrollWidth - main.clientWidth);
    said.textContent = `LOOKED ${width}: ${wide} ${Math.min(...sizes, ...drawn) >= 11.99}`;
    document.body.append(said);
  };
  document.body.append(frame);
}</script></body>"""


def test_a_browser_shows_the_report_without_scrolling_sideways_and_in_readable_sizes(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("needs chromium or google-chrome")
    levels = {"dense": 2.0, "nc-topk-mean": 3.0, "streaming": 44.0, "window": 2.1}
    rows = [entry for n in (512, 4096) for task in ("recall", "perplexity") for entry in rows_of(task, n, levels)]
    rows += answers_of(4096, dict.fromkeys(levels, lambda i: i % 3 > 0))
    run = write_run(tmp_path / "a", rows, model="m" * 120, lengths=[512, 4096])
    write_report([run])
    page = json.dumps((run / "report.html").read_text(encoding="utf-8")).replace("</", "<\\/")
    (tmp_path / "look.html").write_text(LOOK % page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", "--virtual-time-budget=20000"]
    command = [browser, *options, "--dump-dom", (tmp_path / "look.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
    assert set(re.findall(r"LOOKED [^<]*", shown.rpartition("</script>")[2])) == {
        f"LOOKED {w}: 0 true" for w in (1280, 1049, 390)
    }


def test_loss_by_position_is_of_the_samples_that_a_method_shares_with_dense():
    def measured(sample, method, over, length=512):
        losses = [sample + place / 10 + over * place for place in range(10)]
        return row("perplexity", length, sample, method, 2.0, token_losses=losses)

    rows = [
        *(measured(i, "dense", 0.0) for i in range(3)),
        measured(2, "nc-topk", 0.5),
        measured(0, "dense", 0.0, 1024),
    ]
    [panel] = position_panels(measurements(rows))
    assert panel.title == "perplexity at 512 tokens"
    assert {line.label: list(line.values) for line in panel.lines} == {
        "dense": [0.0] * 10,
        "α·n^C top-k": pytest.approx([0.5 * place for place in range(10)]),
    }

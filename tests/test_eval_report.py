"""The report: everything in it escaped and inside one file, and sentences that follow the numbers."""

import csv
import itertools
import math
import re
import shutil
import subprocess

import pytest
from eval_tasks.progress import Forecast, Step, duration

from eval_tasks.findings import Findings
from eval_tasks.merging import differing, merge_runs
from eval_tasks.methods import METHODS
from eval_tasks.provenance import record_session
from eval_tasks.report import Section, write_report
from eval_tasks.store import ResultStore
from eval_tasks.summary import place_of, summarise, to_csv
from eval_tasks.tables import quality_table
from eval_tasks.verdicts import comparisons, needed_budgets
from nc_patch.cli import main

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
NASTY = "<script>alert('x')</script>&"


def row(task, length, sample, method, perplexity, budget=64, **further):
    return {
        "key": f"{task}{length}{sample}{method}",
        "method": method,
        "task": task,
        "length": length,
        "sample": sample,
        "budget": budget,
        "loss_sum": 10 * math.log(perplexity),
        "tokens": 10,
        "bytes": 40,
        "attended_fraction": 1.0 if method == "dense" else 0.05,
        "mean_keys": 50.0,
        "tail_attended_fraction": 0.05,
        "tail_mean_keys": 60.0,
        "seconds": 2.0,
        "peak_memory": 5_000_000,
        "ran_dense": {},
        "commit": NASTY,
        **further,
    }


def rows_of(task, length, perplexities, samples=3):
    return [row(task, length, i, method, p) for i in range(samples) for method, p in perplexities.items()]


def run_of(**identity):
    known = {"model": NASTY, "methods": list(METHODS), "tasks": ["recall", "unseen", "perplexity"], "lengths": [4096]}
    settings = {"samples": 3, "scored": 10, "passage": 10, "alpha": 2.0, "C": 0.5, "equal_at": 1024}
    return {
        "identity": known | settings | identity,
        "text_origin": NASTY,
        "text_tokens": 1000,
        "model_class": "LlamaForCausalLM",
        "model_dtype": "float32",
        "model_parameters": 10,
        "budget_at_equal": 64,
        "log_factor": 6.4,
        "hardware": {"processor": NASTY, "threads": 2},
    }


def findings(rows):
    return Findings(run_of(), rows, summarise(rows))


def test_the_report_escapes_every_text_and_refers_to_nothing_outside_itself(tmp_path):
    rows = rows_of("recall", 4096, {"dense": 2.0, "nc-topk": 7.0, "fixed-topk": 25.7})
    rows[0]["ran_dense"] = {NASTY: 3}
    run = run_of()
    with ResultStore(tmp_path) as store:
        for entry in rows:
            store.append(entry)
        record_session(tmp_path, run.pop("identity"), run, f"nc-patch eval --model '{NASTY}'")
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5
    assert page.count("<svg") == page.count("</svg>") == 3
    assert not re.search(r"(?:src|href)=\"(?!#)", page)
    assert re.search(r"\$\w", page) is None
    prose, _, _ = (tmp_path / "report.md").read_text(encoding="utf-8").split("```")
    assert "<script" not in prose


def write_run(directory, rows, **identity):
    run = run_of(model="tiny", **identity)
    with ResultStore(directory) as store:
        for entry in rows:
            store.append(entry)
        record_session(directory, run.pop("identity"), run, f"nc-patch eval --out {directory.name}")
    return directory


def test_runs_of_the_same_setting_are_merged_and_others_stand_apart(tmp_path):
    dense = rows_of("recall", 4096, {"dense": 2.0})
    first = write_run(tmp_path / "a", dense + rows_of("recall", 4096, {"nc-topk": 3.0}), methods=["dense", "nc-topk"])
    second = write_run(tmp_path / "b", dense + rows_of("recall", 4096, {"window": 9.0}), methods=["dense", "window"])
    other = write_run(tmp_path / "c", dense + rows_of("recall", 4096, {"nc-topk": 2.1}), alpha=4.0)
    assert main(["report", str(first), str(second), str(other), "--out", str(tmp_path / "all")]) == 0
    header, *lines = (tmp_path / "all" / "summary.csv").read_text().splitlines()
    assert header.startswith("section,task,length,method")
    named = [tuple(line.split(",")[i] for i in (0, 3, 4)) for line in lines]
    assert named == [
        ("1", "dense", "3"), ("1", "window", "3"), ("1", "nc-topk", "3"), ("2", "dense", "3"), ("2", "nc-topk", "3"),
    ]  # fmt: skip
    page = (tmp_path / "all" / "report.html").read_text(encoding="utf-8")
    assert "1. tiny: alpha 2.0" in page
    assert "2. tiny: alpha 4.0" in page
    for name in ("a", "b", "c"):
        assert f"nc-patch eval --out {name}" in page
    for name in ("report.md", "comparisons.csv", "main.png"):
        assert (tmp_path / "all" / name).stat().st_size > 0


@pytest.mark.parametrize("indexed", [True, False], ids=["with an index", "of an older version"])
def test_samples_of_one_text_are_paired_whatever_the_number_of_samples_of_a_run(tmp_path, indexed):
    """Two seeds, of which one run measured two samples each and the other three: their third samples differ."""
    seeds = (0, 7)

    def measured(methods, samples):
        rows = []
        for sample, (seed, index) in enumerate(itertools.product(seeds, range(samples))):
            for method, factor in methods.items():
                entry = row("perplexity", 512, sample, method, (10.0 + 20 * seed + 5 * index) * factor, seed=seed)
                key = f"{seed}-{index}-{method}"
                rows.append(entry | {"key": key} | ({"index": index} if indexed else {}))
        return rows

    settings = {"lengths": [512], "seed": list(seeds)}
    first = write_run(tmp_path / "a", measured({"dense": 1.0}, 2), samples=2, **settings)
    second = write_run(tmp_path / "b", measured({"nc-topk": 1.1}, 3), samples=3, **settings)
    [merged] = merge_runs([first, second])
    assert {place_of(entry) for entry in merged.rows} == {(seed, index) for seed in seeds for index in range(3)}
    [_, sparse] = summarise(merged.rows)
    assert sparse.perplexity_ratio == pytest.approx(1.1)
    assert (sparse.low, sparse.high) == pytest.approx((math.log(1.1), math.log(1.1)))
    [compared] = comparisons(merged.rows, 0.05)
    assert (compared.documents, compared.difference) == (4, pytest.approx(math.log(1.1)))


def test_documents_of_lm_eval_are_counted_over_the_seeds_so_runs_of_other_samples_stand_apart(tmp_path):
    rows = [row("lm-eval:arc", 512, i, "dense", 10.0, score=1.0) for i in range(4)]
    settings = {"tasks": ["lm-eval:arc"], "lengths": [512], "seed": [0, 1]}
    runs = [write_run(tmp_path / str(n), rows, samples=n, **settings) for n in (2, 3)]
    merged = merge_runs(runs)
    assert len(merged) == 2
    assert differing(merged) == ["samples 2", "samples 3"]
    assert len(merge_runs([runs[0], runs[0]])) == 1


def test_several_directories_need_a_place_for_the_report(tmp_path, capsys):
    runs = [write_run(tmp_path / name, rows_of("recall", 4096, {"dense": 2.0})) for name in "ab"]
    assert main(["report", *map(str, runs)]) == 2
    assert "--out DIR" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_every_verdict_stands_beside_its_number_of_documents_and_what_was_attended(tmp_path):
    rows = []
    for i in range(24):
        levels = {"dense": 10.0 + i, "nc-topk": (10.0 + i) * 1.01, "window": (10.0 + i) * 2.0}
        rows += [row("perplexity", 512, i, method, level) for method, level in levels.items()]
    write_report(write_run(tmp_path / "a", rows, lengths=[512]), within=0.05)
    with (tmp_path / "a" / "comparisons.csv").open(encoding="utf-8") as file:
        verdicts = {entry["method"]: entry for entry in csv.DictReader(file)}
    assert {method: entry["verdict"] for method, entry in verdicts.items()} == {
        "nc-topk": "worse, yet within the margin",
        "window": "worse",
    }
    assert {(entry["documents"], entry["needed"], entry["needed_within"]) for entry in verdicts.values()} == {
        ("24", "7", "20")
    }
    text = (tmp_path / "a" / "report.md").read_text(encoding="utf-8")
    assert "| perplexity | α·n^C top-k | 512 (the longest measured) | 60.0 | 5.00 % |" in text
    assert "| perplexity | fixed window | none |" in text
    assert "a difference needs at least 7 documents" in text
    assert "and non-inferiority at least 20 (margin 0.0488)" in text


def test_detectable_is_that_of_the_family_that_is_corrected_together(tmp_path):
    rows = []
    for length in (256, 512, 1024):
        for i in range(8):
            rows += [row("perplexity", length, i, m, 10.0 + i % 3 * (m != "dense")) for m in ("dense", "nc-topk")]
    found = {name: comparisons([r for r in rows if r["length"] in name], 0.05) for name in ((512,), (256, 512, 1024))}
    alone, together = found[512,], found[256, 512, 1024]
    assert (alone[0].needed, together[1].needed) == (6, 7)
    assert together[1].detectable > 1.2 * alone[0].detectable
    assert {c.verdict for c in together} == {"undecided"}


def test_answers_are_shown_by_depth_and_compared_as_right_or_wrong(tmp_path):
    rows = []
    for length in (1024, 2048):
        for i in range(20):
            for method, right in (("dense", 1.0), ("nc-topk", float(i > 0)), ("window", float(i % 5 == 0))):
                entry = row("niah_single_1", length, i, method, 1.0, score=right, depth=i / 19)
                rows.append({k: v for k, v in entry.items() if k not in ("loss_sum", "tokens", "bytes")})
    write_report(write_run(tmp_path / "a", rows, tasks=["niah_single_1"], lengths=[1024, 2048]))
    with (tmp_path / "a" / "summary.csv").open(encoding="utf-8") as file:
        scores = {entry["method"]: float(entry["score"]) for entry in csv.DictReader(file) if entry["length"] == "1024"}
    assert scores == pytest.approx({"dense": 1.0, "window": 0.2, "nc-topk": 0.95})
    page = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert "at 2,048 tokens dense attention gets 100 % right, fixed window 20 % (5.0 % of keys)" in page
    assert "nothing is compared" not in page
    assert "share of right answers by depth and length" in page
    verdicts = (tmp_path / "a" / "comparisons.csv").read_text()
    assert re.search(r"niah_single_1,1024,window,20,0\.8,.*,worse$", verdicts, re.MULTILINE)
    assert re.search(r"niah_single_1,1024,nc-topk,20,0\.05,.*,undecided$", verdicts, re.MULTILINE)


def test_iso_quality_is_what_an_iso_run_reports(tmp_path):
    rows = []
    for length in (256, 1024, 4096):
        for i in range(8):
            needs = {k: 2.0 * (2.0 * length**0.5 / k) ** 0.5 for k in (16, 64, 256)}
            rows.append(row("recall", length, i, "dense", 2.0))
            rows += [row("recall", length, i, f"fixed-topk@{k}", level, budget=k) for k, level in needs.items()]
    run = write_run(tmp_path / "a", rows, match="iso", methods=["dense", "fixed-topk"], lengths=[256, 1024, 4096])
    said = " ".join(write_report(run))
    # Within 5 %: (2 √n / k)^½ = 1.05, that is k = 2 √n / 1.1025.
    assert "needs 29 of 256, 58 of 1,024, 116 of 4,096 keys: 1.81·n^0.50" in said
    assert "the power one predicts a length left out best" in said
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Budget needed for the quality of dense" in page


def test_a_browser_shows_the_report_without_anything_beside_it(tmp_path):
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs a browser: {', '.join(BROWSERS)}")
    run = write_run(tmp_path / "a", rows_of("recall", 4096, {"dense": 2.0, "nc-topk": 3.0}))
    write_report(run)
    for width in (1280, 390):
        picture = tmp_path / f"{width}.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
        page = (run / "report.html").as_uri()
        subprocess.run([browser, *options, f"--screenshot={picture}", page], check=True, timeout=120)
        assert picture.stat().st_size > 10_000


def test_the_headline_says_that_the_growing_budget_is_better_where_it_is():
    rows = rows_of("recall", 4096, {"dense": 2.0, "nc-topk": 7.0, "fixed-topk": 25.7, "log-topk": 19.1})
    said = " ".join(findings(rows).headline())
    assert "At 4,096 tokens, α·n^C top-k attention reads 5.0 % of the keys" in said
    assert "recall perplexity of 7.00" in said
    assert "3.5 times dense" in said
    assert "better than both, and ahead in 3 of 3 samples" in said


def test_the_headline_says_that_the_growing_budget_is_worse_where_it_is():
    rows = rows_of("recall", 4096, {"dense": 2.0, "nc-topk": 7.0, "fixed-topk": 5.0, "log-topk": 6.0})
    said = " ".join(findings(rows).headline())
    assert "worse than both, and ahead in 0 of 3 samples" in said


def test_equal_budgets_are_not_called_a_comparison():
    rows = rows_of("recall", 1024, {"dense": 2.0, "nc-topk": 2.5, "fixed-topk": 2.4})
    assert "At this length all budgets are equal" in " ".join(findings(rows).headline())


@pytest.mark.parametrize(
    ("window", "verdict"),
    [(44.0, "does not recall the passage"), (1.35, "it recalls the passage"), (6.0, "recalls a part of the passage")],
)
def test_windows_are_judged_by_the_share_of_the_gain_they_keep(window, verdict):
    rows = rows_of("recall", 4096, {"dense": 1.3, "nc-topk": 1.4, "streaming": window})
    rows += rows_of("unseen", 4096, {"dense": 37.0})
    said = " ".join(findings(rows).headline())
    assert verdict in said
    assert "it keeps 98 % of what dense attention gains" in said


def test_what_patch_model_does_unasked_is_said_beside_the_law_alone():
    levels = {"dense": 2.0, "nc-topk": 7.0, "nc-topk-mean": 2.5, "nc": 2.2, "fixed-topk": 8.0}
    said = " ".join(findings(rows_of("recall", 4096, levels)).headline())
    assert "With the means of the keys that it leaves out beside it, it reaches 2.50 (25.0 % above dense)" in said
    assert (
        "With this budget patch_model, by blocks in prefill and top-k with means in decoding, reaches 2.20 (10" in said
    )
    assert "Budgets that equal its own at 1,024 tokens" in said
    assert "With this budget patch_model" not in " ".join(
        findings(rows_of("recall", 4096, {"dense": 2.0, "nc-topk": 7.0})).headline()
    )


def test_a_length_that_is_not_finished_takes_nothing_from_the_budgets_of_others():
    levels = {"dense": 2.0, "fixed-topk@16": 3.0, "fixed-topk@64": 2.01}
    whole = [row for length in (512, 1024, 2048) for row in rows_of("perplexity", length, levels, 4)]
    found = needed_budgets(whole, 0.05)
    assert [n.length for n in found[0].needed] == [512, 1024, 2048]
    assert found[0].documents == 4
    fewer_documents = rows_of("perplexity", 4096, levels, 1)
    fewer_budgets = rows_of("perplexity", 4096, {"dense": 2.0, "fixed-topk@16": 3.0}, 4)
    assert needed_budgets(whole + fewer_documents, 0.05) == found
    assert needed_budgets(whole + fewer_budgets, 0.05) == found


def test_simulated_methods_are_no_budgets_that_do_not_grow_and_lead_nothing():
    levels = {"dense": 2.0, "nc-topk": 7.0, "fixed-topk": 25.7, "oracle": 2.1, "random": 90.0}
    said = " ".join(findings(rows_of("recall", 4096, levels)).headline())
    assert "oracle" not in said
    assert "random" not in said
    assert "is better, and ahead in 3 of 3 samples" in said
    levels = {"dense": 2.0, "window": 9.0, "oracle": 2.1}
    assert "fixed window attention reads" in findings(rows_of("recall", 4096, levels)).headline()[0]
    unmeasured = rows_of("recall", 4096, {"dense": 2.0, "nc-topk": 3.0}) + rows_of("recall", 4096, {"oracle": 2.0}, 1)
    assert findings(unmeasured).headline()[0].startswith("At 4,096 tokens")
    assert "nothing is compared" in findings(rows_of("recall", 4096, {"dense": 2.0, "oracle": 2.1})).headline()[0]


@pytest.mark.parametrize(
    ("phase", "apart", "said"),
    [
        ("all", False, "Time of one forward pass over 4,096 tokens, as a multiple of dense (3.00 s)"),
        ("decode", False, "tokens, a dense prefill and the scored tokens one by one after it together, as a multiple"),
        ("decode", True, "Time of the scored tokens, read one by one after a dense prefill, within 4,096 tokens"),
        ("question", True, "Time of the scored tokens, read at once after a dense prefill, within 4,096 tokens"),
        ("prefill", True, "Time of the prefill within 4,096 tokens, as a multiple of dense (2.00 s)"),
    ],
)
def test_the_time_in_a_sentence_is_called_by_what_it_is_of(phase, apart, said):
    rows = []
    for i, (method, seconds) in itertools.product(range(3), (("dense", 3.0), ("nc-topk", 2.5))):
        further = {"prefill_seconds": 2.0} if apart else {}
        rows.append(row("perplexity", 4096, i, method, 5.0, seconds=seconds, phase=phase, **further))
    sentence = " ".join(Findings(run_of(phase=phase), rows, summarise(rows)).details())
    assert said in sentence
    multiple = {"all": "0.83", "prefill": "1.00"}.get(phase, "0.50" if apart else "0.83")
    assert f"α·n^C top-k {multiple}." in sentence
    table = quality_table("perplexity", summarise(rows), phase).note
    assert ("one forward pass" in table) == (phase == "all")


def test_the_time_of_answers_is_given_for_each_token_beside_their_number():
    rows = []
    for method, tokens, seconds in (("dense", 11, 4.0), ("nc-topk", 21, 4.0)):
        further = {"score": 1.0, "said_tokens": tokens, "first_token_seconds": 2.0, "phase": "decode"}
        rows += [row("passkey", 512, i, method, 1.0, seconds=seconds, **further) for i in range(3)]
    dense, sparse = summarise(rows)
    assert (dense.seconds_per_answer_token, sparse.seconds_per_answer_token) == pytest.approx((0.2, 0.1))
    assert (dense.tokens_per_second, sparse.tokens_per_second) == pytest.approx((5.0, 10.0))
    assert (dense.answer_tokens, sparse.answer_tokens) == (11, 21)
    note = quality_table("passkey", [dense, sparse], "decode").note
    assert "as many tokens as each method answered with" in note
    for entry in rows:
        del entry["first_token_seconds"]
    assert summarise(rows)[0].tokens_per_second is None


def test_sessions_on_other_hardware_are_said(tmp_path, capsys):
    rows = rows_of("perplexity", 4096, {"dense": 2.0, "nc-topk": 3.0})
    run = write_run(tmp_path / "a", rows)
    assert "as a multiple of dense" in " ".join(Section(merge_runs([run])[0], 0.05).details())
    again = {"hardware": {"processor": "another", "cores": 4, "threads": 2}}
    record_session(run, {}, {}, "nc-patch eval", again)
    assert "This session runs on other hardware (another, 4 cores, 2 threads)" in capsys.readouterr().err
    write_report(run)
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "Parts of this run were measured on different hardware" in text
    assert "another, 4 cores, 2 threads): times and memory of different samples do not compare" in text
    assert "as a multiple of dense" not in text


def test_keys_beside_a_budget_are_named_where_they_differ_from_it():
    rows = rows_of("recall", 4096, {"dense": 2.0, "nc-topk": 3.0, "fixed-topk": 4.0})
    rows += [row("recall", 4096, i, "block", 5.0, budget=64, tail_mean_keys=97.0) for i in range(3)]
    said = " ".join(findings(rows).headline())
    assert "fixed-k top-k 4.00 (64 keys, 5.0 % of all)" in said
    assert "Whole blocks of keys (64 keys by its law, 97 attended, 5.0 % of all) give 5.00" in said
    details = " ".join(findings(rows).details())
    assert "use up the budget of α·n^C blocks at 4,096 tokens (64 keys)" in details
    assert "no block is chosen by content" in details


def test_a_length_at_which_a_method_lacks_samples_is_not_compared():
    rows = rows_of("recall", 2048, {"dense": 2.0, "nc-topk": 3.0})
    rows += rows_of("recall", 4096, {"dense": 2.0}) + rows_of("recall", 4096, {"nc-topk": 9.0}, samples=1)
    assert findings(rows).headline()[0].startswith("At 2,048 tokens")


def test_without_dense_nothing_is_compared():
    rows = rows_of("recall", 2048, {"nc-topk": 3.0, "window": 9.0})
    assert "nothing is compared" in findings(rows).headline()[0]
    assert findings(rows).details()


def test_details_name_where_sparse_attention_loses_and_where_dense_fails():
    rows = rows_of("recall", 4096, {"dense": 30.0, "nc-topk": 33.0}) + rows_of("unseen", 4096, {"dense": 37.0})
    said = " ".join(findings(rows).details())
    assert "worse than dense by more than 2 %: recall perplexity at 4,096 (+10.0 %)" in said
    assert "recalls little at 4,096: judge no method there" in said
    assert "with so few they are rough" in said


def test_the_summary_pairs_samples_and_counts_them():
    rows = [row("perplexity", 512, i, "dense", p) for i, p in enumerate((10.0, 20.0, 40.0))]
    rows += [row("perplexity", 512, i, "nc-topk", p) for i, p in enumerate((11.0, 22.0))]
    dense, sparse = summarise(rows)
    assert dense.perplexity == pytest.approx(20.0)
    assert (dense.loss_minus_dense, dense.low, dense.perplexity_ratio) == (None, None, None)
    assert sparse.perplexity_ratio == pytest.approx(1.1)
    assert (sparse.low, sparse.high) == pytest.approx((math.log(1.1), math.log(1.1)))
    assert (sparse.samples, sparse.worse_samples) == (2, 2)
    assert dense.bits_per_byte == pytest.approx(math.log2(20) / 4)
    header, first, second = to_csv([dense, sparse]).splitlines()
    assert header.startswith("task,length,method,samples")
    assert first.startswith("perplexity,512,dense,3")
    assert len(first.split(",")) == len(second.split(",")) == len(header.split(","))


def test_the_time_left_follows_what_each_method_has_cost():
    forecast = Forecast()
    assert forecast.seconds([Step("dense", 512)]) is None
    forecast.learn(Step("dense", 2048), 4.0)
    forecast.learn(Step("nc-topk", 2048), 12.0)
    assert forecast.seconds([Step("dense", 2048), Step("nc-topk", 2048)]) == pytest.approx(16.0)
    assert forecast.seconds([Step("block", 2048)]) == pytest.approx(8.0)
    assert forecast.seconds([Step("dense", 4096)]) == pytest.approx(12.0)


def test_durations_are_in_words():
    assert [duration(s) for s in (None, 4.4, 125.0, 7260.0)] == ["unknown time", "4 s", "2 min 05 s", "2 h 01 min"]
